"""All layouts of a number of GPUs: which fit, which are fastest, and why the others are out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from kinodit.launch.plan.activations import MODES
from kinodit.launch.plan.estimate import Estimate, Estimator, Memory, Settings
from kinodit.launch.plan.hardware import GIB
from kinodit.models.errors import ConfigError
from kinodit.trainer.certify.layouts import layout_name, num_ranks
from kinodit.trainer.engine.refusals import refusal
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.table import check_heads


@dataclass
class Refused:
    """Layouts that are out for one reason. example: the one that comes closest, in words."""

    why: str
    count: int = 0
    example: str = ""
    shortage: float = float("inf")

    def add(self, example: str, shortage: float = 0.0) -> None:
        """One more; the least `shortage` is kept as the example."""
        self.count += 1
        if shortage < self.shortage:
            self.example, self.shortage = example, shortage


@dataclass(frozen=True)
class Verdict:
    """One layout that was asked for. problem: why it is out, "" if it fits."""

    name: str
    estimate: Estimate | None
    problem: str


@dataclass
class Found:
    """fitting: fastest first; refused: by reason; asked: the recipe's own layout."""

    fitting: list[Estimate] = field(default_factory=list)
    refused: dict[str, Refused] = field(default_factory=dict)
    asked: Verdict | None = None

    def distinct(self) -> list[Estimate]:
        """Of layouts that differ only in how dp is divided, the fastest; fastest first."""
        best: dict[tuple[object, ...], Estimate] = {}
        for one in self.fitting:
            shared = one.parallel
            best.setdefault((shared.cp, shared.ring, shared.tp, shared.ep, one.remat), one)
        return list(best.values())

    def refuse(self, why: str, example: str, shortage: float = 0.0) -> None:
        """Count a layout that is out."""
        self.refused.setdefault(why, Refused(why)).add(example, shortage)


def search(settings: Settings, own: ParallelConfig, remat: RematConfig) -> Found:
    """Every layout of the cluster's GPUs; what `own` and `remat` say beside degrees and mode stays.

    Matrices are split within a node only: between nodes it costs several times what it saves.
    """
    estimator = Estimator(settings)
    found = Found(asked=judge(estimator, own, remat))
    for parallel in layouts(settings, own):
        problem = _impossible(estimator, parallel)
        if problem is not None:
            found.refuse(*problem)
            continue
        for mode in MODES:
            if mode == "offload" and own.cpu_offload:
                continue
            chosen = replace(remat, mode=mode)
            memory = estimator.memory(parallel, chosen)
            over = memory.total - settings.cluster.usable
            if over > 0:
                found.refuse("memory", f"{name_of(parallel, chosen)}: {_too_much(memory)}", over)
            else:
                found.fitting.append(estimator.estimate(parallel, chosen))
    found.fitting.sort(key=lambda one: (one.time.step_s, one.memory.total))
    return found


def judge(estimator: Estimator, own: ParallelConfig, remat: RematConfig) -> Verdict:
    """The recipe's own layout."""
    settings = estimator.settings
    try:
        _, dp_shard = own.resolve(settings.cluster.num_gpus)
    except ConfigError as error:
        return Verdict(name_of(own, remat), None, str(error))
    parallel = replace(own, dp_shard=dp_shard)
    name = name_of(parallel, remat)
    problem = _impossible(estimator, parallel)
    if problem is not None:
        return Verdict(name, None, problem[1])
    made = estimator.estimate(parallel, remat)
    if made.memory.total <= settings.cluster.usable:
        return Verdict(name, made, "")
    usable = settings.cluster.usable / GIB
    return Verdict(name, made, f"{_too_much(made.memory)}; {usable:.1f} GiB can be had")


def layouts(settings: Settings, own: ParallelConfig) -> Iterator[ParallelConfig]:
    """Every way to multiply to the number of GPUs, with the other settings of `own`.

    Where there are experts, every way to deal them out as well.
    """
    total, per_node = settings.cluster.num_gpus, settings.cluster.per_node
    pools = math.gcd(*settings.weights.num_experts) or 1
    for tp in divisors(total):
        if tp > per_node:
            break
        for cp in divisors(total // tp):
            dp = total // (tp * cp)
            for ring in divisors(cp):
                for dp_replicate in divisors(dp):
                    for ep in divisors(math.gcd(pools, dp // dp_replicate * cp)):
                        yield replace(
                            own,
                            dp_replicate=dp_replicate,
                            dp_shard=dp // dp_replicate,
                            cp=cp,
                            ring=ring,
                            tp=tp,
                            ep=ep,
                        )


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in small[::-1] if d * d != number]


def _impossible(estimator: Estimator, parallel: ParallelConfig) -> tuple[str, str] | None:
    """(kind of reason, the reason) why a layout cannot run, whatever the memory."""
    settings = estimator.settings
    workload = settings.workload
    if parallel.ep > 1:
        try:
            parallel.check_ep(parallel.dp_shard)
            settings.weights.check_pools(parallel.ep)
        except ConfigError as error:
            return "ep", f"{layout_name(parallel)}: {error}"
    if settings.wish is not None:
        # Which libraries and devices are on this machine does not matter.
        asked = replace(settings.wish, parallel=parallel, world_size=settings.cluster.num_gpus)
        unmet = refusal(asked)
        if unmet:
            return "engine", f"{layout_name(parallel)}: {unmet}"
    dp = parallel.dp_replicate * parallel.dp_shard
    if dp > workload.packs:
        return "packs", (
            f"{layout_name(parallel)}: {dp} ranks want packs of their own, a step has "
            f"{workload.packs} (data.packs_per_step)"
        )
    tokens = sum(workload.pack_tokens.values())
    if parallel.cp * parallel.tp > tokens:
        return "tokens", (
            f"{layout_name(parallel)}: {parallel.cp * parallel.tp} ranks share {tokens} tokens"
        )
    try:
        check_heads(workload.model, parallel.tp, parallel.ulysses)
    except ConfigError as error:
        return "heads", f"{layout_name(parallel)}: {error}"
    try:
        settings.weights.local_shapes(parallel.tp)
    except ConfigError as error:
        return "widths", f"{layout_name(parallel)}: {error}"
    try:
        estimator.passes(parallel)
    except ConfigError as error:
        return "micro-batches", f"{layout_name(parallel)}: {error}"
    if parallel.cpu_offload and num_ranks(parallel) == 1:
        return "cpu_offload", "1: there is nowhere to offload from in one process"
    return None


def name_of(parallel: ParallelConfig, remat: RematConfig) -> str:
    """Degrees above 1 and what is recomputed."""
    mode = f"every_nth (n={remat.n})" if remat.mode == "every_nth" else remat.mode
    return f"{layout_name(parallel)} remat={mode}"


def _too_much(memory: Memory) -> str:
    """What is needed, and the parts that make up most of it."""
    largest = sorted(memory.parts.items(), key=lambda part: -part[1])[:3]
    shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    return f"needs {memory.total / GIB:.1f} GiB ({shown}, ...)"
