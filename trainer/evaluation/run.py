"""`kinodit evaluate`: losses, and clips for the validation set's captions, over all ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kinodit.data.config import DatasetConfig
from kinodit.data.encode import SampleEncoder
from kinodit.trainer import checkpoint
from kinodit.trainer.config import RunConfig
from kinodit.trainer.evaluation.distance import EvaluationError
from kinodit.trainer.evaluation.drawn import DrawnSamples
from kinodit.trainer.evaluation.losses import Losses
from kinodit.trainer.generate import using_ema
from kinodit.trainer.sampling import find_checkpoint, load_parts
from kinodit.trainer.topology import Topology
from kinodit.trainer.validation import VALIDATION_SEED_OFFSET, validation_step

RESULT_FILE = "evaluation.json"
ALL_TASKS = "all"


@dataclass(frozen=True)
class EvaluationConfig:
    """What the command line asks for.

    num_samples:  clips of the validation set, and as many generated ones; 0: eval.num_samples
    step:         of the checkpoint; None: the last
    with_samples: generate, or measure losses only
    tasks:        of the recipe, to draw, too, from what the validation set gives; ("all",): each
    """

    num_samples: int = 0
    step: int | None = None
    with_samples: bool = True
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_samples < 0 or self.num_samples == 1:
            raise EvaluationError(f"--samples {self.num_samples}: must be at least 2")

    def chosen(self, config: RunConfig) -> list[str]:
        """The tasks that are asked for. Raises EvaluationError for one that the recipe lacks."""
        chosen = list(config.tasks) if self.tasks == (ALL_TASKS,) else list(self.tasks)
        unknown = [name for name in chosen if name not in config.tasks]
        if unknown or (self.tasks and not chosen):
            there = ", ".join(config.tasks) or "none"
            raise EvaluationError(
                f"--tasks {' '.join(self.tasks)}: there is no such task; the recipe has {there}"
            )
        return chosen


def evaluate_run(
    run_dir: Path,
    config: RunConfig,
    wanted: EvaluationConfig,
    topology: Topology,
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Evaluate a checkpoint of a run; its figures, on rank 0. Collective.

    Rank 0 writes them, and the samples, to RUN/evaluation/step-N. Packs, samples and features are
    shared out over the ranks; figures are the same bits on any number of them. `progress` is given
    what this rank does, and how much of it is done.
    """
    step = checkpoint.step_of(find_checkpoint(run_dir, wanted.step))
    tasks = wanted.chosen(config)
    config = _decoding(config)
    if wanted.num_samples:
        settings = dataclasses.replace(config.eval, num_samples=wanted.num_samples)
        config = dataclasses.replace(config, eval=settings)
    config, parts = load_parts(run_dir, config, step, topology, device)
    seed = config.run.seed + VALIDATION_SEED_OFFSET
    encoder = SampleEncoder(parts.encoder.encoders, seed, 0.0)
    data = validation_step(config, encoder.encoders, parts.mesh)
    with using_ema(parts.emas, config.eval.ema), parts.engine.inference() as forward:
        losses = Losses(config, parts, encoder, data.packs, seed, progress)(forward)
    figures: dict[str, Any] = {"step": step, "loss": losses}
    folder = run_dir / "evaluation" / f"step-{step:08d}"
    own = [sample for part in data.packs for sample in part]
    drawn = DrawnSamples(config, parts, encoder, own, folder, progress)
    if wanted.with_samples:
        figures |= drawn.from_captions()
    if tasks:
        figures["tasks"] = {task: drawn.by_task(task) for task in tasks}

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT_FILE).write_text(json.dumps(figures, indent=1) + "\n")

    parts.mesh.from_main(write)
    return figures


def _decoding(config: RunConfig) -> RunConfig:
    """The same without caches of what samples were encoded to: pixels and sounds are measured."""

    def bare(datasets: Mapping[str, DatasetConfig]) -> dict[str, DatasetConfig]:
        return {name: dataclasses.replace(entry, cache="") for name, entry in datasets.items()}

    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, datasets=bare(config.data.datasets)),
        eval=dataclasses.replace(config.eval, datasets=bare(config.eval.datasets)),
    )
