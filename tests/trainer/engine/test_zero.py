"""ZeRO's stages train as one process does; what they cost is measured by benchmarks/engines.py."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinodit.data.synthetic import SyntheticStream, synthetic_pack
from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.certify.layouts import parse_layouts
from kinodit.trainer.certify.run import Case, Certifier
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.config import load_config
from kinodit.trainer.engine.base import Engine, Predictions
from kinodit.trainer.engine.build import build_engine
from kinodit.trainer.engine.config import DeepSpeedConfig, EngineConfig
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.deferred import initial_values
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from tests.support.ranks import ROOT, Ranks

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed"
    ),
]


@pytest.fixture(scope="module")
def small() -> Twin:
    return twin(load_config(ROOT / "configs" / "t2v_tiny.yaml"))


@pytest.fixture(scope="module")
def certifier(small: Twin) -> Iterator[Certifier]:
    made = Certifier(small)
    yield made
    made.close()


FEW = [
    ("zero2", "dp_shard=2", "float64"),
    ("zero3", "dp_shard=2", "float64"),
    ("zero2", "tp=2", "float64"),
    ("zero1", "cp=2,ring=2", "float64"),
    ("zero1", "dp_shard=2", "bfloat16"),
]


GRID = [
    (f"zero{stage}", layout, dtype)
    for dtype, layouts in (
        (
            "float64",
            ("1", "dp_shard=2", "dp_shard=4", "tp=2", "dp_shard=2,tp=2", "cp=2", "dp_shard=2,cp=2"),
        ),
        ("bfloat16", ("dp_shard=2", "tp=2", "cp=2")),
    )
    for layout in layouts
    for stage in (1, 2, 3)
]


@pytest.mark.parametrize(
    ("engine", "layout", "dtype"),
    [
        *FEW,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in GRID if case not in FEW),
    ],
)
def test_trains_as_one_process_does(
    engine: str, layout: str, dtype: str, small: Twin, certifier: Certifier
) -> None:
    (parallel,) = parse_layouts(layout, small.config.parallel)
    row = certifier(Case(parallel, dtype, engine))
    assert row.ok, row.faults
    assert row.verdict is not None
    if dtype == "float64":
        assert row.verdict.parameter_error < 1e-12


def loss(predictions: Predictions) -> Tensor:
    return torch.stack([((part.double() - 1) ** 2).sum() for part in predictions.values()]).sum()


def engine_of(
    twin: Twin,
    rank: int,
    world_size: int,
    engine: EngineConfig,
    parallel: ParallelConfig | None = None,
) -> Engine:
    parallel = parallel or ParallelConfig()
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    with torch.device("meta"):
        model = MMDiT(twin.config.model)
    optim, remat = twin.config.optim, twin.config.remat
    wish = Wish(engine, optim, parallel, PrecisionConfig(), remat, world_size)
    return build_engine(model, initial_values(0), mesh, wish)


def packs(twin: Twin, step: int) -> list[Any]:
    streams: dict[str, SyntheticStream] = twin.streams
    slots = ((0, 1), (2,))
    return [synthetic_pack(step, s, streams, twin.conditions, torch.float32) for s in slots]


def backward(engine: Engine, twin: Twin, step: int) -> None:
    for index, pack in enumerate(packs(twin, step)):
        engine.forward_backward(pack, loss, last=index == 1)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: x.full_tensor() if isinstance(x, DTensor) else x.clone()
        for name, x in tensors.items()
    }


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def life(
    rank: int,
    world_size: int,
    twin: Twin,
    config: DeepSpeedConfig,
    parallel: ParallelConfig | None = None,
) -> None:
    """A step, a skipped step, a step again; then state out, in, and elsewhere."""
    engine = engine_of(twin, rank, world_size, config, parallel)
    backward(engine, twin, 0)
    engine.clip(1.0)
    engine.step(1e-3)
    state = engine.state()
    before, parts = whole(state), {name: local(x).clone() for name, x in state.items()}
    backward(engine, twin, 1)
    engine.clip(1.0)
    engine.skip()
    after = whole(engine.state())
    assert all(torch.equal(after[name], before[name]) for name in before)
    backward(engine, twin, 2)
    norm = engine.clip(1.0)
    engine.step(1e-3)
    expected = whole(engine.state())
    assert bool(expected["optim/exp_avg/heads.video.linear.weight"].any())

    other = engine_of(twin, rank, world_size, config, parallel)
    state = other.state()
    filled = engine_of(twin, rank, world_size, config, parallel).state()
    again = whole(filled)
    assert all(torch.equal(again[name], x) for name, x in whole(state).items())
    for name, tensor in state.items():
        local(tensor).copy_(parts[name])
    other.load(state)
    other.set_num_steps(1)
    backward(other, twin, 2)
    assert float(other.clip(1.0)) == float(norm)
    other.step(1e-3)
    found = whole(other.state())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(DeepSpeedConfig(stage=1), marks=pytest.mark.slow),
        DeepSpeedConfig(stage=3),
        pytest.param(DeepSpeedConfig(stage=2), marks=pytest.mark.slow),
        pytest.param(DeepSpeedConfig(stage=3, hpz=2), marks=pytest.mark.slow),
        pytest.param(DeepSpeedConfig(stage=2, offload_optimizer="cpu"), marks=pytest.mark.slow),
        pytest.param(
            DeepSpeedConfig(stage=3, offload_optimizer="cpu", offload_params="cpu"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            DeepSpeedConfig(stage=2, offload_optimizer="nvme", nvme_path=tempfile.gettempdir()),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            DeepSpeedConfig(
                stage=3,
                offload_optimizer="nvme",
                offload_params="nvme",
                nvme_path=tempfile.gettempdir(),
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["zero1", "zero3", "zero2", "hpz", "offload2", "offload3", "disk2", "disk3"],
)
def test_skipped_steps_leave_no_trace_and_loaded_state_goes_on_bit_equal(
    config: DeepSpeedConfig, small: Twin, two: Ranks
) -> None:
    two.run(life, small, config)


def misspelt(rank: int, world_size: int, twin: Twin) -> str:
    extra = {"zero_optimization": {"reduce_bucket_sizes": 1000}}
    with pytest.raises(ConfigError) as caught:
        engine_of(twin, rank, world_size, DeepSpeedConfig(stage=2, extra=extra))
    return str(caught.value)


def test_keys_that_deepspeed_does_not_know_are_refused(small: Twin, two: Ranks) -> None:
    for message in two.run(misspelt, small):
        assert "engine.extra: DeepSpeed 0." in message and "reduce_bucket_sizes: Extra" in message


def loaded(rank: int, world_size: int, twin: Twin) -> list[str]:
    engine_of(twin, rank, world_size, DeepSpeedConfig(stage=1))
    import sys

    return [name for name in sys.modules if name.startswith("deepspeed_") or "shm_comm" in name]


def test_nothing_is_compiled_when_it_starts(
    small: Twin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    group = Ranks(2)
    try:
        modules = group.run(loaded, small)
    finally:
        group.close()
    assert not any(tmp_path.iterdir()), "an extension was built, or its lock left behind"
    assert all("deepspeed_shm_comm" not in names for names in modules)


def hooked(rank: int, world_size: int, twin: Twin) -> tuple[list[str], list[str]]:
    """Modules with hooks of stage 3 but no parameters, and with parameters but no hooks."""
    model = engine_of(twin, rank, world_size, DeepSpeedConfig(stage=3)).model
    parts = [(name, part) for name, part in model.named_modules() if name]
    empty = [name for name, part in parts if not [*part.parameters(recurse=False)]]
    hooks = [name for name, part in parts if part._forward_pre_hooks]
    return sorted({*empty} & {*hooks}), sorted({name for name, _ in parts} - {*empty} - {*hooks})


def test_stage_3_hooks_into_modules_that_have_parameters_alone(small: Twin, two: Ranks) -> None:
    assert two.run(hooked, small) == [([], []), ([], [])]
