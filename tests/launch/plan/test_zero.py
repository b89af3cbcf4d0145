"""Plans of DeepSpeed's ZeRO: bytes of real ranks, and what is sent by stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from kinodit.launch.plan.estimate import Estimator, Settings
from kinodit.launch.plan.hardware import build_cluster
from kinodit.launch.plan.measure import families, pretended_pack, squared_error, storage_bytes
from kinodit.launch.plan.search import search
from kinodit.launch.plan.state import State, Weights
from kinodit.launch.plan.workload import Workload
from kinodit.launch.plan.zero import cut_by, zero_messages, zero_plan
from kinodit.models.mmdit import MMDiT
from kinodit.models.presets import PRESETS
from kinodit.trainer.config import load_config
from kinodit.trainer.ema import Ema, EmaConfig
from kinodit.trainer.engine.build import build_engine
from kinodit.trainer.engine.config import DeepSpeedConfig, EngineConfig
from kinodit.trainer.engine.refusals import Wish, is_missing
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.deferred import initial_values
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.sequence import cut
from kinodit.trainer.parallel.volume import Formats
from tests.support.quick import quick
from tests.support.ranks import ROOT, Ranks

WORKLOAD = families()["experts"]
FORMATS = {"float32": Formats(4, 4, 4), "bfloat16": Formats(4, 2, 4)}


@dataclass(frozen=True)
class Held:
    """Bytes of a rank. model: what the model computes with; the rest in float32."""

    model: int
    masters: int
    gradients: int
    optimizer: int
    averages: int


def held(
    rank: int, world_size: int, config: DeepSpeedConfig, parallel: ParallelConfig, compute: str
) -> Held:
    """Of a real engine after a backward and an update."""
    precision = PrecisionConfig(compute=compute)  # type: ignore[arg-type]
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    with torch.device("meta"):
        model = MMDiT(WORKLOAD.model)
    wish = Wish(config, OptimConfig(), parallel, precision, RematConfig(), world_size)
    engine = build_engine(model, initial_values(0), mesh, wish)
    average = Ema(EmaConfig(), engine)
    batch = pretended_pack(WORKLOAD)
    if mesh.place.num_shares > 1:
        batch = cut(batch, mesh.place).of(batch)
    engine.forward_backward(batch, squared_error, last=True)
    buffers = [id(buffer) for buffer in model.buffers()]
    masters = [x for x in engine.masters().values() if id(x) not in buffers]
    gradients = list(engine.gradient_parts().values())
    gradients += [p.grad for p in model.parameters() if p.grad is not None]
    reduced = storage_bytes(gradients)
    engine.step(0.1)
    own = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    optimizer = engine._optimizer  # type: ignore[attr-defined]
    return Held(
        storage_bytes([*own, *model.parameters()]),
        storage_bytes(masters),
        reduced,
        storage_bytes(optimizer.tensors()),
        storage_bytes(average.average.values()),
    )


CASES = [
    (DeepSpeedConfig(stage=2), ParallelConfig(dp_shard=2), "float32"),
    (DeepSpeedConfig(stage=3), ParallelConfig(dp_shard=1, cp=2, tp=2), "float32"),
    (DeepSpeedConfig(stage=3), ParallelConfig(dp_shard=2, ep=2), "bfloat16"),
    (DeepSpeedConfig(stage=1), ParallelConfig(dp_shard=2), "bfloat16"),
    (DeepSpeedConfig(stage=3), ParallelConfig(dp_shard=2), "bfloat16"),
    (DeepSpeedConfig(stage=2), ParallelConfig(dp_shard=2, tp=2), "float32"),
    (DeepSpeedConfig(stage=1), ParallelConfig(dp_shard=4, ep=2), "float32"),
    (DeepSpeedConfig(stage=2), ParallelConfig(dp_shard=2, tp=2, ep=2), "bfloat16"),
    (DeepSpeedConfig(stage=3), ParallelConfig(dp_shard=4, ep=2), "float32"),
]


@pytest.mark.gloo
@pytest.mark.skipif(is_missing("deepspeed"), reason="needs the extra deepspeed")
@pytest.mark.parametrize(
    ("config", "parallel", "compute"),
    quick(CASES, CASES[0], CASES[2]),
)
def test_ranks_hold_what_was_planned(
    config: DeepSpeedConfig, parallel: ParallelConfig, compute: str, groups: dict[int, Ranks]
) -> None:
    size = parallel.dp_shard * parallel.cp * parallel.tp
    plan = zero_plan(Weights(WORKLOAD.model), config, parallel, FORMATS[compute], 1)
    for found in groups[size].run(held, config, parallel, compute):
        assert plan.state == State(
            found.model + found.masters, found.gradients, found.optimizer, found.averages
        )


def test_what_is_offloaded_lies_on_the_host() -> None:
    weights, parallel = Weights(PRESETS["300m"]), ParallelConfig(dp_shard=8)
    here = DeepSpeedConfig(stage=3)
    plain = zero_plan(weights, here, parallel, FORMATS["bfloat16"], 1)
    there = replace(here, offload_optimizer="cpu")
    moved = zero_plan(weights, there, parallel, FORMATS["bfloat16"], 1)
    assert moved.host + moved.state.total == plain.state.total
    assert moved.state.optimizer == moved.state.gradients == moved.state.averages == 0
    all_there = replace(there, offload_params="cpu")
    kept = zero_plan(weights, all_there, parallel, FORMATS["bfloat16"], 1).state
    # Small parameters stay whole where they are used.
    assert kept.total == cut_by(weights, here, parallel).kept * 2


def test_stages_send_what_the_paper_says() -> None:
    """Section 7: twice the parameters a step, three times at stage 3 if not all may stay."""
    weights, parallel = Weights(PRESETS["2b"]), ParallelConfig(dp_shard=8)
    formats = Formats(4, 2, 2)
    whole = 2 * cut_by(weights, DeepSpeedConfig(stage=2), parallel).whole * 7 / 8
    sent = []
    for stage in (1, 2, 3):
        made = zero_messages(weights, DeepSpeedConfig(stage=stage), parallel, formats, 1)
        assert made is not None
        sent.append(made.nbytes / whole)
    assert sent == pytest.approx([2, 2, 3], rel=1e-4)
    four = zero_messages(weights, DeepSpeedConfig(stage=1), parallel, formats, 4)
    assert four is not None and four.nbytes / whole == pytest.approx(2, rel=1e-4)
    four = zero_messages(weights, DeepSpeedConfig(stage=2), parallel, formats, 4)
    assert four is not None and four.nbytes / whole == pytest.approx(5, rel=1e-4)
    assert zero_messages(weights, DeepSpeedConfig(), ParallelConfig(dp_shard=1), formats, 1) is None


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_experts_that_are_dealt_out_leave_each_rank_an_equal_share(stage: int) -> None:
    """And cross between ranks with the same ones alone."""
    model = load_config(ROOT / "configs" / "av_moe_30b.yaml").model
    config, formats = DeepSpeedConfig(stage=stage), FORMATS["bfloat16"]
    weights, shared = Weights(model), ParallelConfig(dp_shard=64)
    dealt = replace(shared, ep=8)
    numel = sum(math.prod(weight.shape) for weight in weights.weights)
    for parallel in (shared, dealt):
        state = zero_plan(weights, config, parallel, formats, 0).state
        assert state.optimizer / (8 * numel / 64) == pytest.approx(1, abs=1e-3)
    experts = sum(math.prod(weight.shape) for weight in weights.weights if weight.pool)
    assert experts > numel / 2
    every, fewer = (cut_by(weights, config, one).others for one in (shared, dealt))
    expected = (numel - experts) * 63 / 64 + experts / 8 * 7 / 8
    assert every == pytest.approx(numel * 63 / 64, rel=1e-3)
    assert fewer == pytest.approx(expected, rel=1e-3)


def settings_for(config: EngineConfig) -> Settings:
    model = PRESETS["2b"]
    wish = Wish(config, OptimConfig(), ParallelConfig(), PrecisionConfig(), RematConfig())
    return Settings(
        workload=Workload(model, {"text": 128, "video": 4096}, segments=1, packs=16),
        weights=Weights(model),
        formats=FORMATS["bfloat16"],
        cluster=build_cluster("H100", 8, 80, "ndr400", 8, 4.0),
        num_averages=1,
        micro_batches=0,
        wish=wish,
    )


@pytest.mark.slow
def test_layouts_of_zero_are_planned_as_its_own() -> None:
    """Higher stages hold less, and replicas are refused with the engine's own words."""
    parallel, remat = ParallelConfig(dp_shard=8), RematConfig("full")
    totals, host = [], []
    for stage in (1, 2, 3):
        memory = Estimator(settings_for(DeepSpeedConfig(stage=stage))).memory(parallel, remat)
        totals.append(memory.parts["parameters"] + memory.parts["gradients"])
        host.append(memory.host)
    assert totals[0] >= totals[1] > totals[2] and host == [0, 0, 0]
    offloading = settings_for(DeepSpeedConfig(stage=2, offload_optimizer="cpu"))
    made = Estimator(offloading).estimate(parallel, remat)
    assert made.memory.parts["optimizer"] == 0 and made.memory.host > 3 * 4 * 2e9 / 8
    assert made.time.parts["host"] > 0
    found = search(settings_for(DeepSpeedConfig(stage=2)), ParallelConfig(), remat)
    assert found.fitting
    assert all(one.parallel.dp_replicate == one.parallel.ep == 1 for one in found.fitting)
    assert "ZeRO partitions over all data-parallel ranks" in found.refused["engine"].example
