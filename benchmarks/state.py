"""Parameter and optimizer bytes on a rank, against an equal share of the whole.

Presets of 300M parameters and more are laid out by the trainer's own code on the meta device, on a
pretended process group, as the first rank, which FSDP2 gives the most. Parameters are float32, and
AdamW keeps two moments of each.

    python benchmarks/state.py [--json FILE]

Row state/PRESET/LAYOUT: bytes on that rank over (bytes of all / ranks that split parameters).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from goals import Row, show
from torch._subclasses.fake_tensor import FakeTensorMode

from kinodit.launch.plan.measure import storage_bytes
from kinodit.launch.topology import pretended_group
from kinodit.models.mmdit import MMDiT, MMDiTConfig
from kinodit.models.presets import PRESETS
from kinodit.trainer.optim import OptimConfig, build_optimizer
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig

MAX_RATIO = 1.02
SMALL = {"tiny"}
"""Presets whose vectors weigh something beside their matrices."""
LAYOUTS: dict[str, ParallelConfig] = {
    "fsdp8": ParallelConfig(dp_shard=8),
    "fsdp64": ParallelConfig(dp_shard=64),
    "fsdp96": ParallelConfig(dp_shard=96),
    "fsdp256": ParallelConfig(dp_shard=256),
    "hsdp8x8": ParallelConfig(dp_replicate=8, dp_shard=8),
    "ulysses4": ParallelConfig(dp_shard=1, cp=4),
    "ring8": ParallelConfig(dp_shard=1, cp=8, ring=8),
    "tp2": ParallelConfig(dp_shard=1, tp=2),
    "tp4": ParallelConfig(dp_shard=1, tp=4),
    "tp8": ParallelConfig(dp_shard=1, tp=8),
    "fsdp8 x tp4": ParallelConfig(dp_shard=8, tp=4),
    "fsdp32 x tp8": ParallelConfig(dp_shard=32, tp=8),
    "fsdp4 x ring4 x tp4": ParallelConfig(dp_shard=4, cp=4, ring=4, tp=4),
}


def large_presets() -> dict[str, MMDiTConfig]:
    """All presets but SMALL ones."""
    return {name: config for name, config in PRESETS.items() if name not in SMALL}


def num_weights(config: MMDiTConfig) -> int:
    """Numbers in a model."""
    with torch.device("meta"):
        return sum(p.numel() for p in MMDiT(config).parameters())


def can_have(config: MMDiTConfig, parallel: ParallelConfig) -> bool:
    """Whether heads divide."""
    return config.num_heads % (parallel.tp * parallel.ulysses) == 0


def state_bytes(config: MMDiTConfig, parallel: ParallelConfig, rank: int = 0) -> int:
    """Bytes of parameters and optimizer state on `rank`."""
    world_size = math.prod((parallel.dp_replicate, parallel.dp_shard, parallel.cp, parallel.tp))
    with pretended_group(rank, world_size):
        mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
        with torch.device("meta"):
            model = MMDiT(config)
        parallelize(model, mesh, parallel, PrecisionConfig(), RematConfig(), compile_blocks=False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            optimizer = build_optimizer(OptimConfig(), model)
            optimizer.state()  # made when it is first asked for
            return storage_bytes([*model.parameters(), *optimizer.tensors()])


def rows_of(preset: str, config: MMDiTConfig, layouts: Sequence[str]) -> Iterator[Row]:
    """A row for each of the layouts that the model can have."""
    total = 3 * 4 * num_weights(config)
    for name in layouts:
        parallel = LAYOUTS[name]
        if not can_have(config, parallel):
            continue
        found = state_bytes(config, parallel)
        share = total / (parallel.dp_shard * parallel.cp * parallel.tp)
        row = f"state/{preset}/{name.replace(' ', '')}"
        yield Row.at_most(row, found / share, MAX_RATIO, f"{found / 2**30:.3f} GiB")


def main() -> None:
    """Lay out, print a table, write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    presets = large_presets()
    parser.add_argument("--presets", nargs="+", default=list(presets), choices=list(presets))
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows = (row for name in args.presets for row in rows_of(name, presets[name], list(LAYOUTS)))
    show(rows, "on the first rank", args.json)


if __name__ == "__main__":
    main()
