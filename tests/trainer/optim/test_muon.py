"""Muon: what it does to a matrix, which matrices it takes, and that no layout changes it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.models.presets import PRESETS
from kinodit.trainer.certify.trace import trace
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.certify.verdict import compare_traces
from kinodit.trainer.config import RunConfig
from kinodit.trainer.optim import MuonConfig, OptimConfig, ParameterRule, build_optimizer
from kinodit.trainer.optim.exchange import LABEL, on_whole
from kinodit.trainer.optim.muon import orthogonalise
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.traffic import Traffic
from tests.support.ranks import Ranks
from tests.support.synthetic import tiny_model_config

FLOAT64 = PrecisionConfig("float64", "float64", "float64")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    made = orthogonalise(drawn(*shape), 5)
    values = torch.linalg.svdvals(made)
    # Jordan's coefficients trade exactness for speed: anything around 1 will do.
    assert values.min() > 0.2 and values.max() < 1.3
    u, _, v = torch.linalg.svd(drawn(*shape), full_matrices=False)
    assert torch.nn.functional.cosine_similarity(made.flatten(), (u @ v).flatten(), 0) > 0.97


def test_a_tall_matrix_is_a_wide_one_on_its_side() -> None:
    assert torch.equal(orthogonalise(drawn(9, 4), 5), orthogonalise(drawn(9, 4).mT, 5).mT)


def test_no_gradient_no_direction() -> None:
    assert torch.count_nonzero(orthogonalise(torch.zeros(4, 6), 5)) == 0


def test_steps_are_those_of_torch() -> None:
    """Nesterov's momentum, scale and decay, against torch's own, which iterates in bfloat16."""
    ours = nn.Linear(48, 16, bias=False)
    theirs = nn.Linear(48, 16, bias=False)
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    config = MuonConfig(weight_decay=0.3, momentum=0.9)
    optimizer = build_optimizer(config, ours)
    referee = torch.optim.Muon(
        theirs.parameters(), weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        gradient = torch.randn(16, 48, generator=torch.Generator().manual_seed(step))
        ours.weight.grad, theirs.weight.grad = gradient.clone(), gradient.clone()
        optimizer.set_lr(0.05)
        referee.param_groups[0]["lr"] = 0.05
        optimizer.step()
        referee.step()
    moved, expected = ours.weight.detach() - start, theirs.weight.detach() - start
    assert float((moved - expected).norm() / expected.norm()) < 0.02


def test_decay_rate_and_scale_of_one_step() -> None:
    net = nn.Linear(6, 4, bias=False, dtype=torch.float64)
    before, gradient = net.weight.detach().clone(), drawn(4, 6)
    rules = {"all": ParameterRule("weight", lr_scale=0.5, weight_decay=0.2)}
    optimizer = build_optimizer(MuonConfig(momentum=0.5, rules=rules), net)
    optimizer.set_lr(0.1)
    net.weight.grad = gradient.clone()
    optimizer.step()
    direction = orthogonalise(0.75 * gradient, 5)
    expected = before * (1 - 0.05 * 0.2) - 0.05 * 0.2 * math.sqrt(6) * direction
    torch.testing.assert_close(net.weight.detach(), expected, rtol=0, atol=1e-14)
    assert net.weight.grad is None


@pytest.mark.parametrize("preset", ["tiny", "2b", "30b"])
def test_hidden_matrices_of_blocks_are_muon_s(preset: str) -> None:
    config = MuonConfig()
    with torch.device("meta"):
        model = MMDiT(PRESETS[preset])
    taken = {name for name, p in model.named_parameters() if config.takes(name, p.ndim)}
    expected = {
        name
        for name, _ in model.named_parameters()
        if "blocks." in name
        and name.split(".")[-2] in ("q", "k", "v", "out", "up", "down", "gate")
        and name.endswith("weight")
        and "modulation" not in name
    }
    assert taken == expected and len(taken) > 10


def test_what_it_takes_is_configurable() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    state = build_optimizer(MuonConfig(adamw=r"^1\."), net).state()
    assert [name for name in state if name.startswith("momentum/")] == ["momentum/0.weight"]
    assert {name for name in state if name.startswith("exp_avg/")} == {
        "exp_avg/0.bias",
        "exp_avg/1.weight",
        "exp_avg/1.bias",
    }
    with pytest.raises(ConfigError, match="leaves no matrix"):
        build_optimizer(MuonConfig(adamw="weight"), net)


@pytest.mark.parametrize("fields", [{"momentum": 1.0}, {"num_iterations": 0}, {"lr": 0.0}])
def test_bad_values_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        MuonConfig(**fields)  # type: ignore[arg-type]


def test_a_name_is_one_choice() -> None:
    with pytest.raises(ConfigError, match="another choice"):
        OptimConfig("muon")


def muon_twin() -> Twin:
    model = tiny_model_config(num_heads=4)
    return twin(RunConfig(model=model, optim=MuonConfig(lr=3e-3, weight_decay=0.1)))


LAYOUTS = [
    ParallelConfig(dp_shard=4),
    ParallelConfig(dp_replicate=2, dp_shard=2),
    ParallelConfig(dp_shard=2, tp=2),
    ParallelConfig(dp_shard=1, cp=2, tp=2),
]


@pytest.mark.gloo
@pytest.mark.slow
def test_every_layout_trains_as_one_process_does(four: Ranks) -> None:
    small = muon_twin()
    reference = trace(0, 1, small, ParallelConfig(dp_shard=1))
    plain = trace(0, 1, replace(small, config=replace(small.config, optim=OptimConfig())), BASE)
    assert compare_traces(reference, [plain]).parameter_error > 1e-4
    for layout in LAYOUTS:
        verdict = compare_traces(reference, four.run(trace, small, layout))
        assert verdict.ok, (layout, verdict.faults)


BASE = ParallelConfig(dp_shard=1)


def share_work(
    rank: int, world_size: int, parallel: ParallelConfig
) -> tuple[list[tuple[int, ...]], float, int]:
    """Shapes of the matrices that this rank worked on; how wrong its parts are; messages."""
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    model = MMDiT(tiny_model_config(num_heads=4))
    for number, parameter in enumerate(model.parameters()):
        parameter.detach().copy_(torch.arange(parameter.numel()).view_as(parameter) + number)
    wholes = {name: p.detach().double() for name, p in model.named_parameters()}
    parallelize(model, mesh, parallel, FLOAT64, RematConfig(), compile_blocks=False)
    named = [(n, p) for n, p in model.named_parameters() if MuonConfig().takes(n, p.ndim)]
    worked: list[tuple[int, ...]] = []

    def work(matrix: Tensor) -> Tensor:
        worked.append(tuple(matrix.shape))
        return matrix * matrix.sum()

    parameters = [p for _, p in named]
    parts = [p.to_local().detach() for p in parameters if isinstance(p, DTensor)]
    with Traffic() as counted:
        made = on_whole(parts, parameters, work)
    error = 0.0
    for (name, _), part, before in zip(named, made, parts, strict=True):
        expected = before * wholes[name].sum()
        if expected.numel():
            error = max(error, float((part / expected - 1).nan_to_num().abs().max()))
    return worked, error, counted.total(LABEL)[0]


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("parallel", "holders"),
    [
        (ParallelConfig(dp_shard=4), 4),
        (ParallelConfig(dp_shard=2, tp=2), 4),
        (ParallelConfig(dp_replicate=2, dp_shard=2), 2),
        (ParallelConfig(dp_replicate=4, dp_shard=1), 1),
    ],
    ids=str,
)
def test_matrices_are_dealt_out_to_those_who_hold_their_parts(
    parallel: ParallelConfig, holders: int, four: Ranks
) -> None:
    found = four.run(share_work, parallel)
    model = MMDiT(tiny_model_config(num_heads=4))
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if MuonConfig().takes(n, p.ndim)]
    assert max(error for _, error, _ in found) < 1e-12
    first = [shape for worked, _, _ in found[:holders] for shape in worked]
    if parallel.dp_replicate == 2:
        first = [shape for worked, _, _ in found for shape in worked]
        shapes = 2 * shapes
    assert sorted(first) == sorted(shapes)
    counts = [len(worked) for worked, _, _ in found]
    assert max(counts) - min(counts) <= 1
    rounds = -(-len(shapes) // (holders * (parallel.dp_replicate if holders == 2 else 1)))
    assert {messages for _, _, messages in found} == {0 if holders == 1 else 2 * rounds}
