"""Validation loss: fixed samples, fixed noise, fixed noise levels; with true and wrong captions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kinodit.data.config import DatasetConfig
from kinodit.models.diffusion.objective import Objective, validation_batches
from kinodit.models.encoders.features import ExtractorConfig
from kinodit.models.errors import ConfigError
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.ema import Ema
from kinodit.trainer.engine.base import Engine, Forward
from kinodit.trainer.generate import using_ema
from kinodit.trainer.metrics import Row
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.sequence import share
from kinodit.trainer.step import loss_tokens


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training.

    every_steps:       0 = never
    num_samples:       clips in the fixed validation set
    datasets:          where they come from; empty: the training datasets
    ema:               which average to evaluate with; "" = the parameters as they are
    shuffled_captions: also measure the loss with another sample's caption: a model that listens to
                       its text has a higher one
    extractors:        name -> pretrained features that `kinodit evaluate` compares samples by,
                       beside the embedded ones
    """

    every_steps: int = 0
    num_samples: int = 64
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    ema: str = ""
    shuffled_captions: bool = True
    extractors: dict[str, ExtractorConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.num_samples < 1:
            raise ConfigError(
                f"eval.every_steps={self.every_steps} must not be negative and "
                f"num_samples={self.num_samples} must be at least 1"
            )


@dataclass
class Evaluator:
    """Measures the same packs each time; every rank holds its share of them.

    batches:  this rank's packs, the same number on every rank
    shuffled: the same packs with captions of other samples; None: not measured
    """

    engine: Engine
    objective: Objective
    emas: dict[str, Ema]
    ema: str
    mesh: Mesh
    modalities: Sequence[str]
    levels: tuple[float, ...]
    seed: int
    batches: Sequence[TokenBatch]
    shuffled: Sequence[TokenBatch] | None

    def __call__(self, step: int) -> Row:
        """The validation row of metrics.jsonl. Collective."""
        row: Row = {"kind": "validation", "step": step, "time_s": time.time()}
        with using_ema(self.emas, self.ema), self.engine.inference() as forward:
            table = self._losses(forward, self.batches)
            wrong = None if self.shuffled is None else self._losses(forward, self.shuffled)
        for index, name in enumerate(self.modalities):
            row[f"loss/{name}"] = float(table[index].mean())
            if wrong is not None:
                row[f"loss_shuffled_captions/{name}"] = float(wrong[index].mean())
        row["bins"] = {
            name: {f"{t:g}": float(value) for t, value in zip(self.levels, values, strict=True)}
            for name, values in zip(self.modalities, table, strict=True)
        }
        return row

    def _losses(self, forward: Forward, batches: Sequence[TokenBatch]) -> torch.Tensor:
        """[modalities, levels] mean token error, float64, over all ranks' packs."""
        shape = (len(self.modalities), len(self.levels))
        sums = torch.zeros(2, *shape, dtype=torch.float64, device=self.engine.device)
        for batch in batches:
            at_levels = validation_batches(self.objective, batch, self.seed, self.levels)
            for column, (_, noised) in enumerate(at_levels):
                noised = share(noised, self.mesh.place).to(self.engine.device)
                errors = self.objective.errors(forward(noised.batch), noised)
                for row, name in enumerate(self.modalities):
                    tokens = noised.batch.modalities[name]
                    counted = loss_tokens(tokens.weight, tokens.role)
                    sums[0, row, column] += (errors[name] * counted).sum()
                    sums[1, row, column] += counted.sum()
        error, count = self.mesh.sum(sums).cpu().unbind()
        return error / count.clamp(min=1)
