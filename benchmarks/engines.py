"""Engines side by side: bytes of optimizer state on a rank, and the time of a step.

Two processes over gloo, one model, the same packs; engines take turns, step by step, so that
whatever else the machine does falls on all of them alike.

    python benchmarks/engines.py [--rounds N] [--json FILE]

Row optimizer_bytes/ENGINE: bytes of AdamW's state on the rank that has most, over its equal share
of two float32 moments. Row step_time/ENGINE: processor time of a step, median over rounds, of the
slowest rank, over the native engine's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from goals import Goal, Row, goal_of, write_rows

from kinodit.data.synthetic import SyntheticStream, synthetic_pack
from kinodit.launch.plan.measure import squared_error, storage_bytes
from kinodit.models.mmdit import MMDiT
from kinodit.models.presets import PRESETS
from kinodit.trainer.certify.engines import ENGINES, can_have, chosen_engines
from kinodit.trainer.certify.ranks import Ranks
from kinodit.trainer.config import RunConfig
from kinodit.trainer.engine.base import Engine
from kinodit.trainer.engine.build import build_engine, build_mesh
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.parallel.deferred import initial_values
from kinodit.trainer.parallel.mesh import ParallelConfig

NUM_RANKS = 2
PARALLEL = ParallelConfig(dp_shard=NUM_RANKS)
GOALS = (Goal("optimizer_bytes/*", 1.02), Goal("step_time/native", 1.0), Goal("step_time/*", 1.5))
SLOTS = ((0, 1, 2, 3), (4, 5, 6))
MOMENTS = 2


def one_step(engine: Engine, packs: list[Any]) -> None:
    """Accumulate over `packs`, clip, update."""
    for index, pack in enumerate(packs):
        engine.forward_backward(pack, squared_error, last=index == len(packs) - 1)
    engine.clip(1.0)
    engine.step(1e-4)


def measure(
    rank: int, world_size: int, names: list[str], rounds: int
) -> tuple[int, dict[str, tuple[int, list[float]]]]:
    """Weights of the model, and for each engine (bytes, seconds of each step)."""
    config = RunConfig()
    model_config = PRESETS["tiny"]
    streams = {
        name: SyntheticStream(stream.in_channels, stream.output)
        for name, stream in model_config.streams.items()
    }
    conditions = {name: c.dim for name, c in model_config.conditions.items()}
    packs = [
        synthetic_pack(0, [10 * rank + slot for slot in slots], streams, conditions, torch.float32)
        for slots in SLOTS
    ]
    engines: dict[str, Engine] = {}
    for name in names:
        with torch.device("meta"):
            model = MMDiT(model_config)
        wish = Wish(
            ENGINES[name], config.optim, PARALLEL, config.precision, config.remat, world_size
        )
        mesh = build_mesh(PARALLEL, ENGINES[name], world_size, rank, torch.device("cpu"))
        engines[name] = build_engine(model, initial_values(0), mesh, wish)
        one_step(engines[name], packs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            one_step(engines[name], packs)
            seconds[name].append(time.process_time() - start)
    num_weights = next(iter(engines.values())).num_parameters
    sizes = {
        name: storage_bytes(engine._optimizer.tensors())  # type: ignore[attr-defined]
        for name, engine in engines.items()
    }
    return num_weights, {name: (sizes[name], seconds[name]) for name in names}


def main() -> None:
    """Measure, print a table, write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    names = [
        name
        for name in chosen_engines("all", ENGINES["native"])
        if can_have(ENGINES[name], PARALLEL, RunConfig())
    ]
    here = str(Path(__file__).resolve().parent)
    ranks = Ranks(NUM_RANKS, (here, *sys.path))
    try:
        by_rank = ranks.run(measure, names, args.rounds)
    finally:
        ranks.close()
    num_weights = by_rank[0][0]
    ideal = MOMENTS * 4 * num_weights / NUM_RANKS
    rows: list[Row] = []
    print(f"{num_weights / 1e6:.2f} M weights on {NUM_RANKS} ranks, {args.rounds} rounds")
    print(f"{'engine':<26} {'state MiB':>10} {'of ideal':>9} {'step ms':>8} {'of native':>10}")
    times = {name: max(statistics.median(found[name][1]) for _, found in by_rank) for name in names}
    for name in names:
        size = max(found[name][0] for _, found in by_rank)
        ratio, slower = size / ideal, times[name] / times["native"]
        print(
            f"{name:<26} {size / 2**20:>10.2f} {ratio:>9.3f} {1000 * times[name]:>8.1f} "
            f"{slower:>10.2f}"
        )
        for row, value in ((f"optimizer_bytes/{name}", ratio), (f"step_time/{name}", slower)):
            rows.append(goal_of(row, GOALS).row(row, value))
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
