"""Validation loss by task, stream and noise level, the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kinodit.data.decode import DecodedSample
from kinodit.data.encode import EncodedSample, SampleEncoder
from kinodit.data.packing import pack
from kinodit.data.tasks import TaskError, TaskMix
from kinodit.models.diffusion.objective import validation_batches
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.batches import with_task
from kinodit.trainer.config import RunConfig
from kinodit.trainer.engine.base import Forward
from kinodit.trainer.parallel.sequence import share
from kinodit.trainer.setup import Parts, master_dtype, outputs
from kinodit.trainer.step import loss_tokens

LossTable = dict[str, dict[str, dict[str, float]]]
Sums = list[list[tuple[float, float]]]
"""[streams][levels] (sum of errors, tokens)."""
GENERATION = "generation"
"""The name of what a recipe without tasks trains: everything from the text."""


@dataclass
class Losses:
    """Measures the packs of the validation step, each task of the recipe on all of them.

    packs: this rank's, the same number on every rank
    progress: is given the task, packs done, packs
    """

    config: RunConfig
    parts: Parts
    encoder: SampleEncoder
    packs: Sequence[Sequence[DecodedSample]]
    seed: int
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None

    def __call__(self, forward: Forward) -> LossTable:
        """Task -> stream -> noise level, and "mean" over them -> loss. Collective.

        Sums are taken per pack, and these added up in the order of the plan: the number of ranks
        changes no bit. A stream that a task never generates is left out.
        """
        encoded = [self.encoder.encode(samples) for samples in self.packs]
        first = [min((s.key.slot for s in samples), default=-1) for samples in encoded]
        mesh, table = self.parts.mesh, LossTable()
        for task in self.config.tasks or (GENERATION,):
            sums = []
            for samples in encoded:
                sums.append(self._sums(forward, self._pack(samples, task)))
                self.progress(f"losses of {task}", len(sums), len(encoded))
            own = list(zip(first, sums, strict=True)) if mesh.counts else []
            rows = [row for part in mesh.gather_objects(own) for row in part if row[0] >= 0]
            table[task] = self._means([found for _, found in sorted(rows, key=lambda row: row[0])])
        return table

    def _pack(self, samples: Sequence[EncodedSample], task: str) -> TokenBatch:
        """A pack of those samples that the task fits."""
        config, dtype = self.config, master_dtype(self.config)
        kept = list(samples)
        if config.tasks:
            mix = TaskMix({task: config.tasks[task]}, self.seed, lambda: self.encoder.text(""))
            kept = []
            for sample in samples:
                try:
                    kept.append(with_task(sample, mix))
                except TaskError:
                    continue  # a picture has no part in what is done with sound
        batch = pack(kept, self.parts.pack_spec)
        latents = {name: tokens.latents.to(dtype) for name, tokens in batch.modalities.items()}
        return batch.with_latents(latents)

    def _sums(self, forward: Forward, batch: TokenBatch) -> Sums:
        parts, levels = self.parts, self.config.objective.validation_levels
        names = outputs(parts.model_config)
        sums: Sums = [[] for _ in names]
        for _, noised in validation_batches(parts.objective, batch, self.seed, levels):
            noised = share(noised, parts.mesh.place).to(parts.engine.device)
            errors = parts.objective.errors(forward(noised.batch), noised)
            for row, name in enumerate(names):
                tokens = noised.batch.modalities[name]
                counted = loss_tokens(tokens.weight, tokens.role)
                error = (errors[name].to(torch.float64) * counted).sum()
                sums[row].append((float(error), float(counted.sum())))
        return sums

    def _means(self, packs: Sequence[Sums]) -> dict[str, dict[str, float]]:
        means: dict[str, dict[str, float]] = {}
        for row, name in enumerate(outputs(self.parts.model_config)):
            by_level = {}
            for column, t in enumerate(self.config.objective.validation_levels):
                error = sum(sums[row][column][0] for sums in packs)
                count = sum(sums[row][column][1] for sums in packs)
                if count:
                    by_level[f"{t:g}"] = error / count
            if by_level:
                means[name] = {**by_level, "mean": sum(by_level.values()) / len(by_level)}
        return means
