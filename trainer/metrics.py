"""What a run measures: losses reduced over ranks, rates, MFU, and where the time goes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kinodit.models.flops import forward_flops
from kinodit.models.mmdit import MMDiTConfig
from kinodit.models.moe.tally import Sums
from kinodit.models.tokens import TokenBatch
from kinodit.trainer import balance
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.peak import share_of_peak
from kinodit.trainer.resilience import pulse
from kinodit.trainer.resilience.stragglers import DATA_WAIT, own_time, report, table
from kinodit.trainer.step import NUM_NOISE_BINS, StepResult

Row = dict[str, object]

BETWEEN_STEPS = ("eval", "checkpoint")
"""Activities that are no part of a step."""


@dataclass
class Clock:
    """Seconds spent per activity since the last `take`.

    cpu_s: CPU time of this thread within "compute"; the rest of it was waited
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_s: float = 0.0

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Add the time inside the context to `activity`."""
        pulse.beat(activity, slow=activity in BETWEEN_STEPS)
        start, cpu_start = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.add(activity, time.perf_counter() - start)
            if activity == "compute":
                self.cpu_s += time.thread_time() - cpu_start

    def add(self, activity: str, seconds: float) -> None:
        """Add `seconds` to `activity`."""
        self.seconds[activity] = self.seconds.get(activity, 0.0) + seconds

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count `seconds` that were measured as one activity as another one."""
        self.add(source, -seconds)
        self.add(target, seconds)

    def take(self) -> dict[str, float]:
        """The seconds so far; starts anew."""
        taken, self.seconds = self.seconds, {}
        return taken


@dataclass
class Window:
    """Steps since the last logged row; sums stay on the device until the row is made.

    Losses and loads are of the steps that updated the model; the others are counted in
    `num_skipped`.
    """

    modalities: Sequence[str]
    clock: Clock = field(default_factory=Clock)
    sums: Tensor | None = None
    grad_norm: Tensor | None = None
    loads: dict[str, Sums] = field(default_factory=dict)
    num_steps: int = 0
    num_skipped: int = 0
    num_tokens: int = 0
    num_samples: int = 0
    flops: float = 0.0
    started_s: float = field(default_factory=time.perf_counter)
    ended_s: float = math.nan

    def add(self, result: StepResult, num_tokens: int, num_samples: int, flops: float) -> None:
        """Add one step of this rank: its tokens, samples and model FLOPs."""
        parts = (result.losses, result.bin_errors.flatten(), result.bin_counts.flatten())
        sums = torch.cat(parts)
        if not result.updated:
            sums = torch.zeros_like(sums)
            self.num_skipped += 1
        self.sums = sums if self.sums is None else self.sums + sums
        if result.updated or self.grad_norm is None:
            self.grad_norm = result.grad_norm
        for name, load in result.loads.items() if result.updated else ():
            self.loads[name] = self.loads[name] + load if name in self.loads else load
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.num_samples += num_samples
        self.flops += flops

    def spent(self) -> tuple[float, dict[str, float]]:
        """Seconds since the window began, and those of each activity. The window ends now."""
        self.ended_s = time.perf_counter()
        return self.ended_s - self.started_s, dict(self.clock.seconds)

    def next(self) -> Window:
        """An empty one that begins where this one ended: what is logged in between is its."""
        return Window(self.modalities, started_s=self.ended_s)

    def row(
        self,
        step: int,
        lr: float,
        mesh: Mesh,
        peak: float,
        loss_weights: Mapping[str, float],
        agreement_wait_s: float = 0.0,
    ) -> Row:
        """The row of metrics.jsonl for the steps in this window. Collective: all ranks call it.

        `peak` is one rank's peak FLOP/s, 0 if it is not known: the row has no "mfu" then, nor where
        more was reached (`share_of_peak`). `agreement_wait_s` is what this rank waited at the ends
        of the steps. Losses are means over the steps of the window. As all wait for the rank whose
        samples come last, `data_wait_s` is that of the rank that waited longest for its own.
        """
        assert self.sums is not None and self.grad_norm is not None
        own = own_time(self.clock.seconds, self.clock.cpu_s, agreement_wait_s, mesh.device)
        ranks = table(own, mesh.rank, mesh.world_size)
        seconds = self.clock.take()
        elapsed_s = time.perf_counter() - self.started_s
        host = torch.tensor(
            [float(self.num_tokens), float(self.num_samples), self.flops], dtype=torch.float64
        )
        host = torch.cat([host, ranks.flatten()]).to(self.sums.device)
        sums = mesh.sum(torch.cat([self.sums, host])).tolist()
        count, bins = len(self.modalities), len(self.modalities) * NUM_NOISE_BINS
        num_updates = self.num_steps - self.num_skipped
        losses = [value / num_updates if num_updates else math.nan for value in sums[:count]]
        errors = sums[count : count + bins]
        counts = sums[count + bins : count + 2 * bins]
        tokens, samples, flops, *flat = sums[count + 2 * bins :]
        rank_times = torch.tensor(flat, dtype=torch.float64).view(ranks.shape).tolist()
        per_step = {name: value / self.num_steps for name, value in seconds.items()}
        row: Row = {
            "kind": "train",
            "step": step,
            "time_s": time.time(),
            "loss": sum(losses),
            "lr": lr,
            "grad_norm": float(self.grad_norm),
            "step_s": elapsed_s / self.num_steps,
            "data_wait_s": max(time[DATA_WAIT] for time in rank_times) / self.num_steps,
            "encode_s": per_step.get("encode", 0.0),
            "compute_s": per_step.get("compute", 0.0),
            "checkpoint_s": per_step.get("checkpoint", 0.0),
            "eval_s": per_step.get("eval", 0.0),
            "tokens": int(tokens),
            "tokens_per_s": tokens / elapsed_s,
            "samples_per_s": samples / elapsed_s,
            "flops": flops / self.num_steps,
            "memory_gib": _peak_memory_gib(mesh.device),
            "skipped_steps": self.num_skipped,
        }
        mfu = share_of_peak(flops / elapsed_s, peak * mesh.world_size)
        if mfu is not None:
            row["mfu"] = mfu
        row |= report(rank_times, self.num_steps)
        row |= balance.report(self.loads, num_updates)
        for name, value in zip(self.modalities, losses, strict=True):
            weight = loss_weights.get(name, 1.0)
            row[f"loss/{name}"] = value / weight if weight else 0.0
        row["noise_bins"] = {
            name: _bins(
                errors[index * NUM_NOISE_BINS : (index + 1) * NUM_NOISE_BINS],
                counts[index * NUM_NOISE_BINS : (index + 1) * NUM_NOISE_BINS],
            )
            for index, name in enumerate(self.modalities)
        }
        return row


def _bins(errors: Sequence[float], counts: Sequence[float]) -> list[list[float]]:
    """[t_low, t_high, mean error, count] of the bins that saw a token."""
    return [
        [index / NUM_NOISE_BINS, (index + 1) / NUM_NOISE_BINS, error / count, count]
        for index, (error, count) in enumerate(zip(errors, counts, strict=True))
        if count
    ]


def _peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def pack_flops(config: MMDiTConfig, batch: TokenBatch) -> int:
    """FLOPs of one forward pass over a pack."""
    return forward_flops(
        config,
        {name: tokens.num_tokens for name, tokens in batch.modalities.items()},
        num_pairs=batch.layout.num_pairs,
        num_segments=batch.num_segments,
        num_levels=batch.level_t.shape[0],
    )
