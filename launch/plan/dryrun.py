"""One rank of the real run on pretended tensors: is the plan what the code would do?

The model is split and sharded by the trainer's own code on a fake process group of any size, whose
collectives send nothing. Then a forward, a backward and an update run on fake CPU tensors, which
have shapes and no memory, and every storage that comes or goes is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from kinodit.launch.plan.activations import activations
from kinodit.launch.plan.estimate import Estimate, Estimator, Settings
from kinodit.launch.plan.measure import pretended_pack, storage_bytes, watched_pass
from kinodit.launch.plan.search import name_of
from kinodit.launch.topology import pretended_group
from kinodit.models.mmdit import MMDiT
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.config import RunConfig
from kinodit.trainer.ema import Ema
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.optim import build_optimizer
from kinodit.trainer.parallel.apply import parallelize
from kinodit.trainer.parallel.mesh import Mesh, build_mesh
from kinodit.trainer.parallel.sequence import cut

TOLERANCE = 0.05
"""Of activations; everything else must be equal."""


@dataclass(frozen=True)
class Check:
    """planned and found: bytes or numbers; tolerance: relative."""

    name: str
    planned: int
    found: int
    tolerance: float = 0.0

    @property
    def ratio(self) -> float:
        """Planned over found."""
        return self.planned / self.found if self.found else float(not self.planned)

    @property
    def ok(self) -> bool:
        """Whether they agree."""
        return abs(self.planned - self.found) <= self.tolerance * self.found


@dataclass(frozen=True)
class DryRun:
    """What was checked of a layout, as which ranks."""

    name: str
    world_size: int
    ranks: tuple[int, ...]
    checks: tuple[Check, ...]
    remark: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ok": self.ok}


def dry_run(settings: Settings, chosen: Estimate, config: RunConfig) -> DryRun:
    """Build the first and the last rank of `chosen`; the first also runs a step.

    Raises:
        UserError: this process is in a process group already.
    """
    start_s = time.monotonic()
    world_size = settings.cluster.num_gpus
    ranks = tuple(dict.fromkeys((0, world_size - 1)))
    checks: list[Check] = []
    for rank in ranks:
        with pretended_group(rank, world_size):
            checks += _one_rank(settings, chosen, config, rank, world_size)
    remark = "collectives were pretended, kernels a CPU's, whose activations were planned likewise"
    remark = _unfollowed(settings, chosen) or remark
    name = name_of(chosen.parallel, chosen.remat)
    return DryRun(name, world_size, ranks, tuple(checks), remark, time.monotonic() - start_s)


def _one_rank(
    settings: Settings, chosen: Estimate, config: RunConfig, rank: int, world_size: int
) -> list[Check]:
    # A CPU has nowhere to offload parameters from; where they lie does not change their size.
    parallel = replace(chosen.parallel, cpu_offload=False)
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    with torch.device("meta"):
        model = MMDiT(settings.workload.model)
    # Kernels are not compiled: what a compiler keeps is not planned for.
    parallelize(model, mesh, parallel, config.precision, chosen.remat, compile_blocks=False)
    index = rank // parallel.tp % (parallel.dp_shard * parallel.cp)
    formats, weights = settings.formats, settings.weights
    planned = weights.state(parallel, formats.params, settings.num_averages, index)
    batch = None if rank or _unfollowed(settings, chosen) else _own_pack(settings, chosen, mesh)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.to_empty(device="cpu")
        optimizer = build_optimizer(config.optim, model)
        engine = NativeEngine(model, optimizer, mesh, config.precision)
        emas = [Ema(ema, engine) for ema in config.ema.values()]
        checks = [
            Check(f"rank {rank}: shards that differ", 0, _wrong_shapes(settings, chosen, model)),
            Check(
                f"rank {rank}: parameters", planned.parameters, storage_bytes(model.parameters())
            ),
            Check(
                f"rank {rank}: averages",
                planned.averages,
                storage_bytes(tensor for ema in emas for tensor in ema.average.values()),
            ),
        ]
        if batch is not None:
            checks += _step(settings, chosen, engine, _mapped(batch, mode.from_tensor))
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            checks.append(
                Check(f"rank {rank}: gradients", planned.gradients, storage_bytes(gradients))
            )
        optimizer.state()  # it is created by then
        checks.append(
            Check(f"rank {rank}: optimizer", planned.optimizer, storage_bytes(optimizer.tensors()))
        )
    return checks


def _wrong_shapes(settings: Settings, chosen: Estimate, model: nn.Module) -> int:
    """How many parameters have other whole shapes than planned, or are not where they should be."""
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    expected = {weight.name: weight.shape for weight in settings.weights.weights}
    wrong = sum(found.get(name) != shape for name, shape in expected.items())
    shapes = settings.weights.local_shapes(chosen.parallel.tp)
    for weight, shape in zip(settings.weights.weights, shapes, strict=True):
        parameter = model.get_parameter(weight.name)
        if isinstance(parameter, DTensor):
            # FSDP2 cuts dim 0 alone: the others are those of the tp rank's part.
            wrong += tuple(parameter.to_local().shape[1:]) != shape[1:]
    return wrong + len(found.keys() ^ expected.keys())


def _unfollowed(settings: Settings, chosen: Estimate) -> str:
    """Why no pass can be run on pretended tensors, "" if one can."""
    if any(stream.refiner_blocks for stream in settings.workload.model.streams.values()):
        return "no pass was run: a refiner counts tokens, which pretended ones do not have"
    if chosen.remat.mode == "offload":
        return "no pass was run: pretended tensors have no memory that could be offloaded"
    return ""


def _own_pack(settings: Settings, chosen: Estimate, mesh: Mesh) -> TokenBatch:
    """This rank's tokens of one forward."""
    _, merged = Estimator(settings).passes(chosen.parallel)
    batch = pretended_pack(settings.workload.of_pass(merged))
    return cut(batch, mesh.place).of(batch) if mesh.place.num_shares > 1 else batch


def _step(
    settings: Settings, chosen: Estimate, engine: NativeEngine, batch: TokenBatch
) -> list[Check]:
    """A forward and backward: activations."""
    work = Estimator(settings).work(chosen.parallel)
    on_cpu = replace(work, sizes=replace(work.sizes, cuda=False))
    planned = activations(on_cpu, chosen.remat)
    found, _ = watched_pass(engine, batch)
    return [Check("rank 0: activations, peak", planned.peak, found, TOLERANCE)]


def _mapped(batch: TokenBatch, function: Callable[[Tensor], Tensor]) -> TokenBatch:
    """The batch with `function` applied to every tensor that goes to the device."""
    return replace(
        batch,
        modalities={name: tokens.map(function) for name, tokens in batch.modalities.items()},
        level_segment=function(batch.level_segment),
        level_t=function(batch.level_t),
        conditions={name: function(vector) for name, vector in batch.conditions.items()},
    )
