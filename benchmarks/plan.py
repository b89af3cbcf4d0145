"""What `kinodit plan` says against what is really there: state to the byte, activations to 5 %.

    python benchmarks/plan.py [--json FILE]

Small models of five kinds take a step on one process; every storage is counted while it lives.
Values are ratios of planned to measured. (State and traffic of several ranks are tests:
tests/launch/plan/.)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from goals import Row, show

from kinodit.launch.plan.activations import MODES
from kinodit.launch.plan.measure import families, measure, planned_peak, planned_state
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig

ALONE = ParallelConfig(dp_shard=1)
TOLERANCE = 0.05


def rows() -> Iterator[Row]:
    """State by part and activations by policy, of every family."""
    for name, workload in families().items():
        for mode in MODES:
            measured = measure(0, 1, workload, ALONE, RematConfig(mode=mode))
            if mode == MODES[0]:
                planned = planned_state(workload, ALONE, 0)
                for part in ("parameters", "gradients", "optimizer", "averages"):
                    size = getattr(measured.state, part)
                    ratio = getattr(planned, part) / size
                    yield Row.exactly(f"state_bytes/{name}/{part}", ratio, 1.0, shown(size))
            ratio = planned_peak(workload, ALONE, RematConfig(mode=mode), 4) / measured.peak
            row = f"activations/{name}/{mode}"
            yield Row.near(row, ratio, 1.0, TOLERANCE, shown(measured.peak))


def shown(nbytes: int) -> str:
    """As a person reads it."""
    return f"{nbytes / 2**20:.3f} MiB"


def main() -> None:
    """Print a table, write it as JSON if asked."""
    parser = argparse.ArgumentParser(description="the plan against what is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")
    args = parser.parse_args()
    show(rows(), "measured", args.json)


if __name__ == "__main__":
    main()
