"""A wandb server that never answers, and secrets: neither leaves a trace where it should not."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lives import Lives, Start
from tests.support.wandb_offline import offline_runs, read_offline_run

pytestmark = [pytest.mark.chaos, pytest.mark.gloo]

SECTIONS: dict[str, dict[str, object]] = {"run": {"steps": 10}}
CANARY = "canary4f7d1c0e9b2a8d6e5f3c1b0a9d8e7f6c5b4a3d2e"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_does_not_answer_holds_nothing_up(
    recipe: Path, lives: Lives, silent_server: str
) -> None:
    environment = {"WANDB_BASE_URL": silent_server, "WANDB_API_KEY": CANARY, "WANDB_MODE": "online"}
    # Slow enough for wandb to give the server up in the meantime.
    slow = "sleep:seconds=2,times=10,rank=0,point=step:begin"
    overrides = ("run.name=silent", "log.wandb=online", "resilience.hang_s=60")
    start = Start(recipe, overrides, slow, environment=environment)
    began_s = time.monotonic()
    end = lives.run(start)
    assert end.codes == [0, 0], end.logs
    assert time.monotonic() - began_s < 120
    run = recipe.parent / "silent"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    warnings = [row["message"] for row in events if row["event"] == "warning"]
    warnings = [message for message in warnings if message.startswith("wandb ")]
    assert len(warnings) == 1, warnings
    assert "wandb sync" in warnings[0]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 10
    (stored,) = offline_runs(run)
    offline = read_offline_run(stored)
    assert offline.id == (run / "run_id").read_text().strip()
    assert [row["_step"] for row in offline.history] == list(range(1, 11))
    # The training thread hands rows over and goes on: what it waits for is its own sleep.
    spent = [json.loads(line) for line in (run / "time.jsonl").read_text().splitlines()]
    windows = [row for row in spent if row["kind"] == "window"]
    other_s = sum(row["elapsed_s"] - sum(row["seconds"].values()) for row in windows) - 20.0
    busy_s = sum(sum(row["seconds"].values()) for row in windows)
    assert other_s < 0.05 * (busy_s + 20.0)
    stop_s = next(row["time_s"] for row in events if row["event"] == "stop")
    assert (run / "wandb").stat().st_mtime < stop_s + 5.0


def test_no_file_of_a_run_has_the_secret(recipe: Path, lives: Lives) -> None:
    environment = {
        "WANDB_API_KEY": CANARY,
        "STORAGE_SECRET": CANARY,
        "HF_TOKEN": CANARY,
        "WANDB_MODE": "offline",
    }
    base = ("run.name=canary", "log.wandb=offline", f"sample.prompts=[{CANARY}]")
    overrides = (*base, "checkpoint.every_steps=2", "resilience.hang_s=2")
    once = recipe.parent / "canary.once"
    faults = [
        "nan:point=step:gradients,rank=0,step=1",
        f"raise:rank=0,step=3,once={once}1",
        f"kill:rank=1,step=4,once={once}2",
        f"sleep:rank=1,step=5,once={once}3",
    ]
    start = Start(recipe, overrides, ";".join(faults), environment=environment)
    ends = lives.restart(start, 5)
    assert len(ends) == 4, [end.codes for end in ends]
    run = recipe.parent / "canary"
    files = [path for path in run.rglob("*") if path.is_file()]
    kinds = {path.name for path in files}
    assert {"config.yaml", "events.jsonl", "time.jsonl", "summary.txt", "rank-00001.txt"} <= kinds
    assert any(path.suffix == ".wandb" for path in files)
    leaks = [path for path in files if CANARY.encode() in path.read_bytes()]
    assert not leaks
    assert not [log for end in ends for log in end.logs if CANARY in log]
