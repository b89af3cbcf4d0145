"""The validation step of a run: which samples, packed and drawn always alike."""

from __future__ import annotations

import dataclasses

from kinodit.data.encode import Encoders, SampleEncoder
from kinodit.data.loader import StepData
from kinodit.data.select import open_datasets, plan_spec
from kinodit.trainer.batches import BatchSource
from kinodit.trainer.config import RunConfig
from kinodit.trainer.encoders import cost_model
from kinodit.trainer.evaluate import Evaluator
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.quarantine import Quarantine
from kinodit.trainer.setup import Parts, master_dtype, outputs, task_mix

VALIDATION_SEED_OFFSET = 1


def build_evaluator(
    config: RunConfig,
    parts: Parts,
    encoders: Encoders,
    mesh: Mesh,
) -> Evaluator | None:
    """Measures validation loss on a fixed step of its own plan; None if the recipe has none."""
    if not config.eval.every_steps:
        return None
    seed = config.run.seed + VALIDATION_SEED_OFFSET
    packs = validation_step(config, encoders, mesh)
    whole = SampleEncoder(encoders, seed, 0.0)
    tasks = task_mix(config, whole, seed)
    source = BatchSource(whole, parts.pack_spec, 0, master_dtype(config), tasks)
    return Evaluator(
        engine=parts.engine,
        objective=parts.objective,
        emas=parts.emas,
        ema=config.eval.ema,
        mesh=mesh,
        modalities=outputs(parts.model_config),
        levels=config.objective.validation_levels,
        seed=seed,
        batches=source.fixed(packs, shuffle_captions=False),
        shuffled=(
            source.fixed(packs, shuffle_captions=True) if config.eval.shuffled_captions else None
        ),
    )


def validation_step(config: RunConfig, encoders: Encoders, mesh: Mesh) -> StepData:
    """This rank's packs of the fixed step; what is in a pack does not depend on the ranks."""
    per_pack = -(-config.data.samples_per_step // config.data.packs_per_step)
    data = dataclasses.replace(
        config.data,
        datasets=config.eval.datasets or config.data.datasets,
        samples_per_step=config.eval.num_samples,
        packs_per_step=-(-config.eval.num_samples // per_pack),
        packing="count",
        cost_budget=None,
        window_steps=1,
        token_budget=None,
        prefetch_steps=1,
    )
    datasets = open_datasets(data)
    seed = config.run.seed + VALIDATION_SEED_OFFSET
    spec = plan_spec(data, datasets, cost_model(config, encoders), seed)
    steps = Quarantine(config.run.folder, mesh, data, datasets, spec)
    try:
        return next(steps)
    finally:
        steps.close()
