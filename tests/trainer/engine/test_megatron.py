"""The megatron engine: its linears and groups are megatron-core's, and nothing else changes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.models.presets import PRESETS
from kinodit.trainer.certify.layouts import with_degrees
from kinodit.trainer.certify.trace import trace
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.certify.verdict import compare_traces
from kinodit.trainer.config import RunConfig
from kinodit.trainer.engine.build import build_engine, build_mesh
from kinodit.trainer.engine.config import DeepSpeedConfig, MegatronConfig, NativeConfig
from kinodit.trainer.engine.megatron import core
from kinodit.trainer.engine.megatron.groups import AXES, ranks_along
from kinodit.trainer.engine.megatron.linears import swap_linears
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.deferred import initial_values
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.table import table_of
from tests.support.ranks import Ranks
from tests.support.synthetic import synthetic_pack, tiny_model_config

CPU = torch.device("cpu")
MCORE = (core.ColumnParallelLinear, core.RowParallelLinear)


def small_twin() -> Twin:
    return twin(RunConfig(model=tiny_model_config(num_heads=4)))


def layout(**degrees: int) -> ParallelConfig:
    return with_degrees(ParallelConfig(), degrees)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_linear_of_the_table_is_megatron_core_s(preset: str) -> None:
    with torch.device("meta"):
        model = MMDiT(PRESETS[preset])
    rows = table_of(model)
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    linears = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    swap_linears(model, rows, None, 1)
    modules = dict(model.named_modules())
    assert {name for name, part in modules.items() if isinstance(part, MCORE)} == linears
    assert not any(isinstance(part, nn.Linear) for part in modules.values())
    for name in linears:
        (style,) = (row.style for row in rows if row.matches(name))
        column = isinstance(modules[name], core.ColumnParallelLinear)
        assert column == (style in ("column", "stored")), name
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == before


def build_case(rank: int, world_size: int, parallel: ParallelConfig, given: bool) -> dict[str, Any]:
    """Which linears, groups and predictions the engine has."""
    from torch.distributed import distributed_c10d as c10d

    collection = None
    if given:
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(
            parallel.tp, 1, context_parallel_size=parallel.cp, order="tp-cp-ep-dp-pp"
        )
        collection = core.ProcessGroupCollection.use_mpu_process_groups()
    made: list[Any] = []
    create = core.HyperCommGrid.create_pg

    def created(grid: Any, dims: Any, **settings: Any) -> Any:
        made.append(create(grid, dims, **settings))
        return made[-1]

    core.HyperCommGrid.create_pg = created
    before = set(c10d._world.pg_map)
    try:
        config = MegatronConfig()
        mesh = build_mesh(parallel, config, world_size, rank, CPU, collection)
        with torch.device("meta"):
            model = MMDiT(tiny_model_config(num_heads=4))
        wish = Wish(
            config, OptimConfig(), parallel, PrecisionConfig(), RematConfig(), world_size, "cpu"
        )
        engine = build_engine(model, initial_values(0), mesh, wish)
        pack = synthetic_pack(0, [1, 2, 6], torch.float32)
        with engine.inference() as forward:
            prediction = forward(pack)["video"]
    finally:
        core.HyperCommGrid.create_pg = create
        if given:
            parallel_state.destroy_model_parallel()
    new = set(c10d._world.pg_map) - before
    used = [mesh.heads, mesh.ring, mesh.pack]
    used += [mesh.device_mesh.get_group(axis) for axis in (0, 1)] if mesh.device_mesh else []
    used += [mesh.tp_mesh.get_group()] if mesh.tp_mesh else []
    known = set(made)
    if collection is not None:
        known = {g for g in vars(collection).values() if isinstance(g, dist.ProcessGroup)}
    return {
        "foreign groups": len(new - set(made)),
        "groups made": len(new),
        "groups not megatron-core's": sum(g is not None and g not in known for g in used),
        "other linears": [n for n, m in model.named_modules() if isinstance(m, nn.Linear)],
        "linears": sum(isinstance(m, MCORE) for m in model.modules()),
        "prediction": prediction.numpy().copy(),
    }


@pytest.mark.gloo
@pytest.mark.parametrize("given", [False, True], ids=["own grid", "collection passed in"])
@pytest.mark.parametrize("parallel", [layout(cp=2, tp=2), layout(dp_shard=2, tp=2)], ids=str)
def test_every_group_comes_from_megatron_core(
    parallel: ParallelConfig, given: bool, four: Ranks
) -> None:
    for found in four.run(build_case, parallel, given):
        assert found["foreign groups"] == found["groups not megatron-core's"] == 0
        assert (found["groups made"] == 0) == given
        assert not found["other linears"] and found["linears"] > 20


def expert_groups(
    rank: int, world_size: int, parallel: ParallelConfig
) -> tuple[dict[str, list[int]], ...]:
    """Ranks of each axis of the experts' mesh: the native engine's, this one's, one passed in."""
    native = build_mesh(parallel, NativeConfig(), world_size, rank, CPU)
    own = build_mesh(parallel, MegatronConfig(), world_size, rank, CPU)
    assert own.device_mesh is not None and own.expert_mesh is not None
    collection = core.ProcessGroupCollection(
        pp=own.device_mesh.get_group(0),
        dp_cp=own.device_mesh.get_group(1),
        ep=own.expert_mesh.get_group("ep"),
        expt_dp=own.expert_mesh.get_group("dp_shard_cp"),
    )
    given = build_mesh(parallel, MegatronConfig(), world_size, rank, CPU, collection)
    found = []
    for mesh in (native, own, given):
        experts = mesh.expert_mesh
        assert experts is not None and experts.mesh_dim_names is not None
        found.append(
            {
                axis: dist.get_process_group_ranks(experts.get_group(axis))
                for axis in experts.mesh_dim_names
            }
        )
    return tuple(found)


@pytest.mark.gloo
def test_experts_are_dealt_out_to_the_ranks_of_the_native_mesh(four: Ranks) -> None:
    for rank, found in enumerate(four.run(expert_groups, layout(dp_shard=4, ep=2))):
        assert found[0] == found[1] == found[2]
        assert found[1]["ep"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert found[1]["dp_shard_cp"] == [rank % 2, rank % 2 + 2]


def refused(rank: int, world_size: int, parallel: ParallelConfig) -> str:
    collection = core.ProcessGroupCollection(tp=dist.group.WORLD)
    with pytest.raises(ConfigError) as caught:
        build_mesh(parallel, MegatronConfig(), world_size, rank, CPU, collection)
    with pytest.raises(ConfigError, match=r"engine\.name=megatron"):
        build_mesh(parallel, NativeConfig(), world_size, rank, CPU, collection)
    return str(caught.value)


@pytest.mark.gloo
def test_a_collection_that_does_not_fit_is_refused(four: Ranks) -> None:
    (message, *_) = four.run(refused, layout(dp_shard=2, tp=2))
    assert "no group of ranks [0]" in message and "[[0, 1, 2, 3]]" in message


def test_ranks_along_axes() -> None:
    shape = dict(zip(AXES, (2, 2, 1, 3, 2), strict=True))
    assert ranks_along(shape, ["tp"], 7) == (6, 7)
    assert ranks_along(shape, ["heads", "dp_shard"], 1) == (1, 3, 5, 7, 9, 11)
    assert ranks_along(shape, ["dp_replicate"], 13) == (1, 13)
    assert ranks_along(shape, ["ring"], 5) == (5,)


LAYOUTS = [
    layout(tp=4),
    layout(dp_shard=2, tp=2),
    layout(cp=2, tp=2),
    layout(cp=2, ring=2, tp=2),
]
ZERO = importlib.util.find_spec("deepspeed") is not None


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_it_trains_as_one_process_does(sequence_parallel: bool, four: Ranks) -> None:
    small, config = small_twin(), MegatronConfig(sequence_parallel=sequence_parallel)
    reference = trace(0, 1, small, layout())
    assert compare_traces(reference, [trace(0, 1, small, layout(), engine_config=config)]).ok
    for parallel in LAYOUTS if sequence_parallel else LAYOUTS[:3]:
        found = four.run(trace, small, parallel, "float64", 0, False, "cpu", config)
        verdict = compare_traces(reference, found)
        assert verdict.ok, (parallel, verdict.faults)


@pytest.mark.gloo
@pytest.mark.skipif(not ZERO, reason="needs the extra deepspeed")
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_partitions_what_its_linears_hold(stage: int, four: Ranks) -> None:
    small, config = small_twin(), DeepSpeedConfig(stage=stage, megatron=True)
    reference = trace(0, 1, small, layout())
    for parallel in (layout(dp_shard=2, tp=2), layout(cp=2, tp=2)):
        found = four.run(trace, small, parallel, "float64", 0, False, "cpu", config)
        verdict = compare_traces(reference, found)
        assert verdict.ok, (parallel, verdict.faults)
