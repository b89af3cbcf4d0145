"""`kinodit evaluate`: losses, and clips for the validation set's captions, over all ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kinodit.data.decode import DecodedSample
from kinodit.data.encode import SampleEncoder
from kinodit.trainer import checkpoint
from kinodit.trainer.config import RunConfig
from kinodit.trainer.evaluation.distance import EvaluationError
from kinodit.trainer.evaluation.figures import Measured, Media, figures_of, measure
from kinodit.trainer.evaluation.losses import Losses
from kinodit.trainer.evaluation.truth import Told
from kinodit.trainer.gallery import save_gallery
from kinodit.trainer.generate import using_ema
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.sampling import find_checkpoint, load_parts
from kinodit.trainer.setup import Parts, clip_shape, master_dtype, sampling_shift
from kinodit.trainer.topology import Topology
from kinodit.trainer.validation import VALIDATION_SEED_OFFSET, validation_step

RESULT_FILE = "evaluation.json"
NUM_SHOWN = 64
"""Samples that are kept as files."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What the command line asks for.

    num_samples:  clips of the validation set, and as many generated ones; 0: eval.num_samples
    step:         of the checkpoint; None: the last
    with_samples: generate, or measure losses only
    """

    num_samples: int = 0
    step: int | None = None
    with_samples: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 0 or self.num_samples == 1:
            raise EvaluationError(f"--samples {self.num_samples}: must be at least 2")


def evaluate_run(
    run_dir: Path,
    config: RunConfig,
    wanted: EvaluationConfig,
    topology: Topology,
    device: torch.device,
) -> dict[str, Any]:
    """Evaluate a checkpoint of a run; its figures, on rank 0. Collective.

    Rank 0 writes them, and the samples, to RUN/evaluation/step-N. Packs, samples and features are
    shared out over the ranks; figures are the same bits on any number of them.
    """
    step = checkpoint.step_of(find_checkpoint(run_dir, wanted.step))
    if wanted.num_samples:
        settings = dataclasses.replace(config.eval, num_samples=wanted.num_samples)
        config = dataclasses.replace(config, eval=settings)
    config, parts = load_parts(run_dir, config, step, topology, device)
    seed = config.run.seed + VALIDATION_SEED_OFFSET
    encoder = SampleEncoder(parts.encoder.encoders, seed, 0.0)
    data = validation_step(config, encoder.encoders, parts.mesh)
    with using_ema(parts.emas, config.eval.ema), parts.engine.inference() as forward:
        losses = Losses(config, parts, encoder, data.packs, seed)(forward)
    figures: dict[str, Any] = {"step": step, "loss": losses}
    folder = run_dir / "evaluation" / f"step-{step:08d}"
    if wanted.with_samples:
        own = [sample for samples in data.packs for sample in samples]
        figures |= _of_samples(config, parts, own, folder)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT_FILE).write_text(json.dumps(figures, indent=1) + "\n")

    parts.mesh.from_main(write)
    return figures


def _of_samples(
    config: RunConfig, parts: Parts, own: Sequence[DecodedSample], folder: Path
) -> dict[str, Any]:
    """Figures, on rank 0, of clips for the captions of the validation set. Collective."""
    mesh = parts.mesh
    known = [(s.key.slot, s.caption, _told(s)) for s in own]
    every = sorted(_gathered(mesh, known), key=lambda row: row[0])
    extractors = {
        name: extractor.build(mesh.device) for name, extractor in config.eval.extractors.items()
    }
    with using_ema(parts.emas, config.sample.ema):
        clips = parts.generator(master_dtype(config))(
            [caption for _, caption, _ in every],
            clip_shape(config),
            config.sample,
            sampling_shift(config, parts),
        )
    made = [
        measure(
            clip.index,
            Media(clip.video, clip.fps, clip.sound, clip.rate_hz),
            clip.prompt,
            every[clip.index][2],
            extractors,
        )
        for clip in clips
    ]
    rate_hz = config.data.audio_rate
    real = [
        measure(
            s.key.slot, Media(s.video, s.fps, s.audio, rate_hz), s.caption, _told(s), extractors
        )
        for s in own
    ]
    # What ten thousand samples are measured by is a few numbers each; their pixels stay where
    # they are.
    shown = _gathered(mesh, [clip for clip in clips if clip.index < NUM_SHOWN])
    shown.sort(key=lambda clip: clip.index)
    mesh.from_main(lambda: save_gallery(folder, shown, config.sample))
    sides = [sorted(_gathered(mesh, side), key=_place) for side in (made, real)]
    figures = figures_of(*sides) if mesh.is_main else {}
    return {"num_samples": len(every), **figures}


def _gathered(mesh: Mesh, own: Sequence[Any]) -> list[Any]:
    """The items of all ranks; of those that share packs, one counts."""
    return [row for part in mesh.gather_objects(list(own) if mesh.counts else []) for row in part]


def _place(measured: Measured) -> int:
    return measured.place


def _told(sample: DecodedSample) -> Told:
    extra = sample.meta.extra
    return Told(extra.get("sprite", ""), extra.get("direction", ""))
