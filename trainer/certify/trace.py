"""What a few optimizer steps leave behind, gathered whole: the thing that certificates compare."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinodit.data.synthetic import synthetic_pack, task_pack
from kinodit.models.diffusion.objective import (
    NoisedBatch,
    Objective,
    TokenShape,
    build_objective,
)
from kinodit.models.mmdit import MMDiT
from kinodit.models.random import generator
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.certify.probe import Probe, Sums
from kinodit.trainer.certify.twin import Twin
from kinodit.trainer.ema import Ema, EmaConfig
from kinodit.trainer.engine.base import Engine
from kinodit.trainer.engine.build import build_engine, build_mesh
from kinodit.trainer.engine.config import EngineConfig, NativeConfig
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.parallel import parts
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.deferred import Values, initial_values
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.step import Step

Array = NDArray[np.float64]
NATIVE = NativeConfig()
FLOAT64 = PrecisionConfig("float64", "float64", "float64")
ROUNDING_UNIT = 2.0**-8
"""Of bfloat16: half the distance between neighbouring numbers at 1."""
SLOTS_OF_PACKS = ((0, 5), (1, 2, 6), (3,), (4, 7))
"""Samples of each pack of a step: unequal packs, whose number no group of 3 or more divides."""


def low_precision(recipe: PrecisionConfig) -> PrecisionConfig:
    """What a row in bfloat16 computes in: float32 at rest, and gradients summed as the recipe says.

    A recipe that computes in float32 is looked at in bfloat16 all the same.
    """
    reduce: Literal["float32", "bfloat16"] = (
        "bfloat16" if recipe.reduce == "bfloat16" else "float32"
    )
    return PrecisionConfig("float32", "bfloat16", reduce)


@dataclass
class Trace:
    """What training left, tensors in the order of the model's parameters.

    losses, norms: of each step
    gradients:     of the first step, before clipping
    parameters:    after the last step
    averages:      the EMA after the last step
    draws:         (step, slot) -> digest of the sample's latents, noise and level as they were used
    probes:        module -> sums of the first step on this rank, if it was asked for
    loads:         of each step, layer with experts -> tally of their use
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Array] = field(default_factory=dict)
    parameters: dict[str, Array] = field(default_factory=dict)
    averages: dict[str, Array] = field(default_factory=dict)
    draws: dict[tuple[int, int], str] = field(default_factory=dict)
    probes: dict[str, Sums] = field(default_factory=dict)
    loads: list[dict[str, Array]] = field(default_factory=list)


def trace(
    rank: int,
    world_size: int,
    twin: Twin,
    parallel: ParallelConfig,
    dtype: str = "float64",
    perturbation: int = 0,
    probed: bool = False,
    device: str = "cpu",
    engine_config: EngineConfig = NATIVE,
) -> Trace:
    """Train the twin on synthetic packs under `parallel`. Every rank calls it.

    dtype:        "float64" or "bfloat16"
    perturbation: above 0, every number of the input is moved by one rounding unit of bfloat16, up
                  or down as this number decides
    engine_config: which engine, and its settings, compilation and micro-batches among them
    """
    config = twin.config
    precision = FLOAT64 if dtype == "float64" else low_precision(config.precision)
    mesh = build_mesh(parallel, engine_config, world_size, rank, torch.device(device))
    with torch.device("meta"):
        model = MMDiT(config.model)
    wish = Wish(
        engine_config,
        config.optim,
        parallel,
        precision,
        RematConfig() if probed else config.remat,
        world_size,
        device,
    )
    engine = build_engine(model, _stirred(initial_values(config.run.seed)), mesh, wish)
    averages = Ema(next(iter(config.ema.values()), EmaConfig(0.9)), engine)
    found = Trace()
    if probed:
        refined = [name for name, stream in config.model.streams.items() if stream.refiner_blocks]
        probe = Probe(mesh.place, refined, found.probes)
        probe.attach(model)
    outputs = [name for name, stream in config.model.streams.items() if stream.output]
    shapes = {
        name: TokenShape(config.model.streams[name].in_channels, config.model.stream_width(name))
        for name in outputs
    }
    step = Step(
        engine,
        _Recorder(build_objective(config.objective, shapes), found),
        [averages],
        mesh,
        outputs,
        config.objective.loss_weights,
        config.run.seed,
        config.optim.max_grad_norm,
    )
    for number in range(1 if probed else twin.num_steps):
        batches = [
            _perturbed(pack, perturbation)
            for pack in _batches(
                twin,
                number,
                mesh.dp_index,
                mesh.dp_size,
                precision.params_dtype,
                engine_config.micro_batches,
            )
        ]
        with _recorded_gradients(engine, found.gradients if number == 0 else None):
            result = step(number, batches, config.optim.lr)
        found.losses.append(float(mesh.sum(result.losses.sum())))
        found.norms.append(float(result.grad_norm))
        found.loads.append({name: whole(load.values) for name, load in result.loads.items()})
    parameters, average = engine.canonical(engine.masters()), engine.canonical(averages.average)
    found.parameters = {name: whole(p) for name, p in parameters.items()}
    found.averages = {name: whole(p) for name, p in average.items()}
    return found


def whole(tensor: Tensor) -> Array:
    """All of a tensor that may be sharded, on the host. Collective for one that is."""
    array: Array = parts.whole(tensor).cpu().numpy().copy()
    return array


def _stirred(values: Values) -> Values:
    """Every parameter moved off its initial value: behind a closed gate no gradient is wrong."""

    def value(name: str, shape: Sequence[int]) -> Tensor:
        drawn = generator("certify", name).standard_normal(tuple(shape))
        return values(name, shape) + torch.from_numpy(0.02 * drawn)

    return value


def _perturbed(pack: TokenBatch, perturbation: int) -> TokenBatch:
    """The pack with its latents and condition vectors moved by one rounding unit."""
    if not perturbation:
        return pack

    def moved(name: str, x: Tensor) -> Tensor:
        slots = [key.slot for key in pack.samples]
        drawn = generator("perturb", perturbation, name, *slots).integers(0, 2, tuple(x.shape))
        return x * (1 + ROUNDING_UNIT * torch.from_numpy(2.0 * drawn - 1)).to(x.dtype)

    latents = {name: moved(name, tokens.latents) for name, tokens in pack.modalities.items()}
    conditions = {name: moved(f"condition {name}", x) for name, x in pack.conditions.items()}
    return replace(pack.with_latents(latents), conditions=conditions)


def _batches(
    twin: Twin, step: int, dp_index: int, dp_size: int, dtype: torch.dtype, micro_batches: int
) -> list[TokenBatch]:
    """The packs of one data-parallel rank, with as many filler packs as it takes.

    Merged into `micro_batches`, as a recipe may ask; 0: as they are.
    """
    own: list[Sequence[int]] = list(itertools.islice(SLOTS_OF_PACKS, dp_index, None, dp_size))
    own += [()] * (-(-len(SLOTS_OF_PACKS) // dp_size) - len(own))
    if micro_batches:
        size = -(-len(own) // micro_batches)
        own = [tuple(itertools.chain(*own[i : i + size])) for i in range(0, len(own), size)]
    tasks, seed = twin.config.tasks, twin.config.run.seed
    if tasks:
        streams, conditions = twin.streams, twin.conditions
        return [task_pack(step, slots, streams, conditions, dtype, tasks, seed) for slots in own]
    return [synthetic_pack(step, slots, twin.streams, twin.conditions, dtype) for slots in own]


@contextmanager
def _recorded_gradients(engine: Engine, into: dict[str, Array] | None) -> Iterator[None]:
    """Within it, gradients are kept in `into` before they are clipped."""
    clip = engine.clip

    def recording(max_norm: float) -> Tensor:
        if into is not None:
            into.update({name: whole(gradient) for name, gradient in engine.gradients()})
        return clip(max_norm)

    engine.clip = recording  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.clip = clip  # type: ignore[method-assign]


class _Recorder:
    """An objective that notes what it drew for each sample."""

    def __init__(self, objective: Objective, found: Trace) -> None:
        self._objective, self._found = objective, found

    def corrupt(self, batch: TokenBatch, seed: int, level: float | None = None) -> NoisedBatch:
        """See `Objective`."""
        noised = self._objective.corrupt(batch, seed, level)
        for segment, key in enumerate(batch.samples):
            digest = hashlib.sha256(key.sample.encode())
            for name, tokens in noised.batch.modalities.items():
                mine = tokens.segment == segment
                for tensor in (noised.clean[name], noised.noise[name], noised.t(name)):
                    digest.update(tensor[mine].contiguous().numpy().tobytes())
            self._found.draws[key.step, key.slot] = digest.hexdigest()
        return noised

    def velocity(self, prediction: Tensor, noised: NoisedBatch, modality: str) -> Tensor:
        """See `Objective`."""
        return self._objective.velocity(prediction, noised, modality)

    def errors(self, predictions: Mapping[str, Tensor], noised: NoisedBatch) -> dict[str, Tensor]:
        """See `Objective`."""
        return self._objective.errors(predictions, noised)
