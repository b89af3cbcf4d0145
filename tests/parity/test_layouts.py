"""Sharded equals unsharded: loss, every gradient, parameters and EMA after several steps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinodit.models.diffusion.objective import RectifiedFlowConfig, build_objective
from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.ema import Ema, EmaConfig
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.optim import OptimConfig, build_optimizer
from kinodit.trainer.parallel import parts
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.step import Step
from tests.support.quick import quick
from tests.support.ranks import Ranks
from tests.support.synthetic import synthetic_pack, tiny_model_config

Array = NDArray[np.float64]
NUM_STEPS = 3
"""Moments of the optimizer and averages are those of several gradients from the second one on."""
PACKS = [[0, 5], [1, 2, 6], [3], [4, 7]]
FLOAT64 = PrecisionConfig("float64", "float64", "float64")


@dataclass(frozen=True)
class Layout:
    """A layout and how a rank's packs are merged into micro-batches (0: one each)."""

    world_size: int
    dp_replicate: int = 1
    micro_batches: int = 0
    cp: int = 1
    ring: int = 1
    tp: int = 1
    remat: str = "none"
    compiled: bool = False


@dataclass(frozen=True)
class Trace:
    """What a run of NUM_STEPS leaves: losses, first gradients, final parameters and EMA."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Array]
    parameters: dict[str, Array]
    ema: dict[str, Array]


def whole(tensor: Tensor) -> Array:
    return parts.whole(tensor).numpy().copy()


def stirred_model() -> MMDiT:
    """A model without zeros, which would hide gradients."""
    model = MMDiT(tiny_model_config(num_heads=4))
    initialize(model, seed=1)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            ramp = torch.arange(parameter.numel(), dtype=torch.float32) + index
            parameter.add_(0.02 * torch.sin(ramp).view_as(parameter))
    return model


def run(
    rank: int,
    world_size: int,
    layout: Layout,
    precision: PrecisionConfig = FLOAT64,
    num_steps: int = NUM_STEPS,
) -> Trace:
    parallel = ParallelConfig(
        dp_replicate=layout.dp_replicate, cp=layout.cp, ring=layout.ring, tp=layout.tp
    )
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    model = stirred_model()
    parallelize(
        model,
        mesh,
        parallel,
        precision,
        RematConfig(layout.remat),  # type: ignore[arg-type]
        compile_blocks=layout.compiled,
    )
    optimizer = build_optimizer(OptimConfig(lr=3e-3), model)
    engine = NativeEngine(model, optimizer, mesh, precision)
    ema = Ema(EmaConfig(0.9), engine)
    objective = build_objective(RectifiedFlowConfig(prediction="velocity"))
    step = Step(engine, objective, [ema], mesh, ["video"], {"video": 0.7}, 3, 1.0)
    dtype = torch.promote_types(precision.compute_dtype, torch.float32)
    losses, norms = [], []
    gradients: dict[str, Array] = {}
    for number in range(num_steps):
        own = [PACKS[i] for i in range(mesh.dp_index, len(PACKS), mesh.dp_size)]
        own += [[]] * (-(-len(PACKS) // mesh.dp_size) - len(own))
        if layout.micro_batches:
            per = len(own) // layout.micro_batches
            own = [[*itertools.chain(*own[i : i + per])] for i in range(0, len(own), per)]
        batches = [synthetic_pack(number, slots, dtype) for slots in own]
        if number == 0:
            gradients = first_gradients(step, engine, batches)
        result = step(number, batches, 3e-3)
        losses.append(float(mesh.sum(result.losses)))
        norms.append(float(result.grad_norm))
    return Trace(
        losses,
        norms,
        gradients,
        {name: whole(p) for name, p in model.named_parameters()},
        {name: whole(p) for name, p in ema.average.items()},
    )


def predict(rank: int, world_size: int, layout: Layout) -> Array:
    """What the model makes of a whole pack, and then of another with the same structure."""
    parallel = ParallelConfig(cp=layout.cp, ring=layout.ring, tp=layout.tp)
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    model = stirred_model()
    parallelize(model, mesh, parallel, FLOAT64, RematConfig(), compile_blocks=False)
    optimizer = build_optimizer(OptimConfig(), model)
    pack = synthetic_pack(0, [1, 2, 6])
    others = {"video": 1 - 2 * pack.modalities["video"].latents}
    with NativeEngine(model, optimizer, mesh, FLOAT64).inference() as forward:
        made = [forward(batch)["video"] for batch in (pack, pack.with_latents(others))]
    return torch.stack(made).numpy()


def first_gradients(step: Step, engine: NativeEngine, batches: list[Any]) -> dict[str, Array]:
    """Gradients of step 0, by running its backward without the update."""
    captured: dict[str, Array] = {}
    clip = engine.clip

    def capture(max_norm: float) -> Tensor:
        captured.update({name: whole(g) for name, g in engine.gradients()})
        raise StopIteration

    engine.clip = capture  # type: ignore[method-assign]
    with pytest.raises(StopIteration):
        step(0, batches, 0.0)
    engine.clip = clip  # type: ignore[method-assign]
    for parameter in engine.model.parameters():
        parameter.grad = None
    return captured


def worst(ours: dict[str, Array], theirs: dict[str, Array]) -> float:
    """Largest difference over the largest value of any tensor."""
    assert ours.keys() == theirs.keys()
    scale = max(float(np.abs(value).max()) for value in theirs.values())
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs) / scale


@pytest.fixture(scope="module")
def reference() -> Trace:
    return run(0, 1, Layout(1))


def check(trace: Trace, reference: Trace) -> None:
    assert trace.losses == pytest.approx(reference.losses, rel=1e-12)
    assert trace.norms == pytest.approx(reference.norms, rel=1e-12)
    assert worst(trace.gradients, reference.gradients) < 1e-12
    assert worst(trace.parameters, reference.parameters) < 1e-12
    assert worst(trace.ema, reference.ema) < 1e-12


def test_training_changes_loss_and_every_parameter(reference: Trace) -> None:
    assert reference.losses[-1] != reference.losses[0]
    dead = [name for name, g in reference.gradients.items() if float(np.abs(g).max()) < 1e-9]
    assert not dead


@pytest.mark.parametrize("micro_batches", quick([1, 2, 4], 1, 2))
def test_accumulation(micro_batches: int, reference: Trace) -> None:
    check(run(0, 1, Layout(1, micro_batches=micro_batches)), reference)


@pytest.mark.parametrize("remat", ["full", "every_nth", "selective", "offload"])
def test_remat(remat: str, reference: Trace) -> None:
    check(run(0, 1, Layout(1, remat=remat)), reference)


LAYOUTS = {
    "ddp2": Layout(2, dp_replicate=2),
    "fsdp2": Layout(2),
    "fsdp2-accumulate1": Layout(2, micro_batches=1),
    "fsdp4": Layout(4),
    "hsdp2x2": Layout(4, dp_replicate=2),
    "ddp4": Layout(4, dp_replicate=4),
    "fsdp2-remat": Layout(2, remat="full"),
}
"""Who has which packs: these sum in another order, step after step."""

SHARED = {
    "ulysses2": Layout(2, cp=2),
    "ring2": Layout(2, cp=2, ring=2),
    "ring4": Layout(4, cp=4, ring=4),
    "ulysses2 x ring2": Layout(4, cp=4, ring=2),
    "fsdp2 x ulysses2": Layout(4, cp=2),
    "fsdp2 x ring2": Layout(4, cp=2, ring=2),
    "ddp2 x ulysses2": Layout(4, dp_replicate=2, cp=2),
    "ring2-remat": Layout(2, cp=2, ring=2, remat="full"),
    "ulysses2-accumulate1": Layout(2, cp=2, micro_batches=1),
    "tp2": Layout(2, tp=2),
    "tp2-accumulate1": Layout(2, tp=2, micro_batches=1),
    "tp2-remat": Layout(2, tp=2, remat="full"),
    "tp2-selective": Layout(2, tp=2, remat="selective"),
    "ring2-selective": Layout(2, cp=2, ring=2, remat="selective"),
    "tp2-offload": Layout(2, tp=2, remat="offload"),
    "fsdp2 x tp2": Layout(4, tp=2),
    "ddp2 x tp2": Layout(4, dp_replicate=2, tp=2),
    "ulysses2 x tp2": Layout(4, cp=2, tp=2),
    "ring2 x tp2": Layout(4, cp=2, ring=2, tp=2),
}
"""Who has which tokens and matrices."""


@pytest.mark.gloo
@pytest.mark.parametrize("name", quick(LAYOUTS, "fsdp2", "fsdp2-accumulate1", "hsdp2x2"))
def test_layout(name: str, groups: dict[int, Ranks], reference: Trace) -> None:
    layout = LAYOUTS[name]
    for trace in groups[layout.world_size].run(run, layout):
        check(trace, reference)


@pytest.mark.gloo
@pytest.mark.parametrize("name", quick(SHARED, "ulysses2", "fsdp2 x tp2", "ring2 x tp2"))
def test_layout_that_shares_packs(name: str, groups: dict[int, Ranks], reference: Trace) -> None:
    layout = SHARED[name]
    for trace in groups[layout.world_size].run(run, layout):
        check(trace, reference)


@pytest.mark.gloo
@pytest.mark.parametrize(
    "layout", [Layout(2, cp=2), Layout(2, tp=2), Layout(4, cp=2, ring=2, tp=2)], ids=str
)
def test_whole_packs_may_be_given_to_ranks_that_share_them(
    layout: Layout, groups: dict[int, Ranks]
) -> None:
    expected = predict(0, 1, Layout(1))
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    for made in groups[layout.world_size].run(predict, layout):
        assert np.abs(made - expected).max() < 1e-12
