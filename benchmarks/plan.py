"""What `kinodit plan` says against what is really there: state to the byte, activations to 5 %.

    python benchmarks/plan.py [--json FILE]

Small models of five kinds take a step on one process; every storage is counted while it lives.
Values are ratios of planned to measured. (State and traffic of several ranks are tests:
tests/launch/plan/.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kinodit.launch.plan.activations import MODES
from kinodit.launch.plan.measure import families, measure, planned_peak, planned_state
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig

ALONE = ParallelConfig(dp_shard=1)
TOLERANCE = 0.05

Row = dict[str, Any]


def rows() -> list[Row]:
    """State by part and activations by policy, of every family."""
    found: list[Row] = []
    for name, workload in families().items():
        for mode in MODES:
            measured = measure(0, 1, workload, ALONE, RematConfig(mode=mode))
            if mode == MODES[0]:
                planned = planned_state(workload, ALONE, 0)
                for part in ("parameters", "gradients", "optimizer", "averages"):
                    ratio = getattr(planned, part) / getattr(measured.state, part)
                    found.append(row(f"state_bytes/{name}/{part}", ratio, "1 exactly", ratio == 1))
            ratio = planned_peak(workload, ALONE, RematConfig(mode=mode), 4) / measured.peak
            ok = abs(ratio - 1) <= TOLERANCE
            found.append(row(f"activations/{name}/{mode}", ratio, "0.95 to 1.05", ok))
    return found


def row(name: str, value: float, goal: str, ok: bool) -> Row:
    """One figure."""
    print(f"{name:<44} {value:>8.4f}  {goal:<13} {'ok' if ok else 'DIFFERS'}", flush=True)
    return {"name": name, "value": value, "goal": goal, "ok": ok}


def main() -> int:
    """Print the rows; 1 if one differs."""
    parser = argparse.ArgumentParser(description="the plan against what is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")
    args = parser.parse_args()
    print(f"{'planned / measured':<44} {'ratio':>8}  goal")
    found = rows()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(one["ok"] for one in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
