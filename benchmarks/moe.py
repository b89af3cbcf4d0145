"""Cost of experts: a step against the dense model of equal FLOPs, and the bytes that tokens travel.

    python benchmarks/moe.py [--repeats 8] [--json FILE]

One thread, process CPU time, repeats interleaved, the faster half of them counts. `step_ratio/*` is
forward and backward of a model in which each video token meets 2 of 8 experts, half as wide as the
feed-forward of the model beside it, over the time of that one. `dispatch_bytes` is what two ranks
receive for the tokens of their experts and for what comes back, forward and backward, over the rows
whose expert is elsewhere. bf16 is skipped, and named, where the CPU has no fast bf16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from dispatch import NUM_EXPERTS, dispatch
from goals import Goal, goal_of, write_rows

from kinodit.models.config import MMDiTConfig, StreamConfig
from kinodit.models.flops import count_active_parameters, count_parameters
from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.tokens import (
    ModalityTokens,
    Role,
    SampleKey,
    TokenBatch,
    build_layout,
)
from kinodit.trainer.certify.ranks import Ranks

GOALS = (Goal("step_ratio/fp32", 1.15), Goal("step_ratio/bf16", 1.3), Goal("dispatch_bytes", 1.0))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH, CHANNELS, NUM_TOKENS = 512, 16, {"text": 64, "video": 2048}


def models(dtype: torch.dtype) -> tuple[MMDiT, MMDiT]:
    """(dense, with experts), of the same width and depth."""
    dense = MMDiTConfig(
        streams={
            "text": StreamConfig(CHANNELS, output=False, position="none"),
            "video": StreamConfig(CHANNELS),
        },
        width=WIDTH,
        num_heads=8,
        num_double_blocks=2,
    )
    experts = ExpertsConfig(NUM_EXPERTS, 2, dense.mlp_ratio / 2)
    made = []
    for config in (dense, replace(dense, experts={"video": experts})):
        model = MMDiT(config)
        initialize(model, 0)
        made.append(model.to(dtype))
    return made[0], made[1]


def pack(dtype: torch.dtype) -> TokenBatch:
    """One sample of random tokens."""
    source = torch.Generator().manual_seed(0)
    modalities = {}
    for name, count in NUM_TOKENS.items():
        side = torch.arange(count)
        modalities[name] = ModalityTokens(
            latents=torch.randn(count, CHANNELS, generator=source).to(dtype),
            segment=torch.zeros(count, dtype=torch.int64),
            group=torch.zeros(count, dtype=torch.int64),
            position=torch.stack([side // 256, side // 16 % 16, side % 16], -1).float(),
            role=torch.full((count,), int(Role.NOISED), dtype=torch.int8),
            level=torch.zeros(count, dtype=torch.int64),
            weight=torch.ones(count),
        )
    return TokenBatch(
        modalities,
        torch.zeros(1, dtype=torch.int64),
        torch.full((1,), 0.5),
        {},
        build_layout(list(modalities.values())),
        (SampleKey(0, 0, "benchmark"),),
    )


def timed(model: MMDiT, batch: TokenBatch) -> float:
    """CPU seconds of one forward and backward pass."""
    start = time.process_time()
    model(batch)["video"].square().mean().backward()
    elapsed = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return elapsed


def step_ratio(dtype: torch.dtype, repeats: int) -> float:
    """Time with experts over time without."""
    dense, routed = models(dtype)
    batch = pack(dtype)
    timed(dense, batch), timed(routed, batch)
    times = [(timed(dense, batch), timed(routed, batch)) for _ in range(repeats)]
    faster = (repeats + 1) // 2
    dense_s, routed_s = (
        statistics.mean(sorted(column)[:faster]) for column in zip(*times, strict=True)
    )
    return routed_s / dense_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense, routed = models(torch.float32)
    print(
        f"dense: {count_parameters(dense.config) / 1e6:.1f} M parameters; with experts: "
        f"{count_parameters(routed.config) / 1e6:.1f} M, of which a token meets "
        f"{count_active_parameters(routed.config) / 1e6:.1f} M"
    )
    figures: dict[str, float] = {}
    has_bf16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    for name, dtype in DTYPES.items():
        if name == "bf16" and not has_bf16:
            print("step_ratio/bf16 skipped: this CPU has no fast bf16")
            continue
        figures[f"step_ratio/{name}"] = step_ratio(dtype, options.repeats)
    ranks = Ranks(2, (str(Path(__file__).parent),))
    try:
        found = ranks.run(dispatch)
    finally:
        ranks.close()
    figures["dispatch_bytes"] = sum(got for got, _ in found) / sum(least for _, least in found)
    rows = [goal_of(name, GOALS).row(name, value) for name, value in figures.items()]
    for row in rows:
        mark = "ok" if row.ok else "missed"
        print(f"{row.name:<18} {row.value:7.3f}  goal {row.goal:.2f}  {mark}")
    if options.json:
        write_rows(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
