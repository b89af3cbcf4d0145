"""A rank whose threads hang over a sample, or crash, is ended with the sample's name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kinodit.trainer.resilience.errors import HUNG
from kinodit.trainer.resilience.watchdog import read_reports
from tests.support.ranks import ROOT

SCRIPT = """
import ctypes, sys, threading, time
from pathlib import Path
from kinodit.trainer.resilience import pulse, watchdog

watchdog.GATHER_S = 0.1
code = watchdog.fork_watched()
if code is None:
    def harm():
        time.sleep(0.1)
        pulse.at_work().begin("sample 'bad' (clips:3 in 000.tar)")
        if sys.argv[2] == "crash":
            ctypes.string_at(0)
        ctypes.PyDLL(None).pause()

    pulse.watch(0, 1, Path(sys.argv[1]), hang_s=0.4, slow_s=0.4)
    thread = threading.Thread(target=harm)
    thread.start()
    thread.join()
sys.exit(code)
"""


@pytest.mark.parametrize(("harm", "code"), [("hold", HUNG), ("crash", 128 + 11)])
def test_what_threads_were_at_is_named(tmp_path: Path, harm: str, code: int) -> None:
    folder = tmp_path / "stacks" / "start-0001"
    command = [sys.executable, "-c", SCRIPT, str(folder), harm]
    environment = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    said = "sample 'bad' (clips:3 in 000.tar) for 0."
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert event["event"] == ("hang" if harm == "hold" else "crash")
    assert said in event["message"] and event["message"] in done.stderr
    stacks = (folder / "rank-00000.txt").read_text()
    thread = event["message"].partition("in thread ")[2][:18]
    assert stacks.startswith(f"decoding {said}") and f"hread {thread}" in stacks
    if harm == "hold":
        (report,) = read_reports(folder)
        assert len(report.decoding) == 1 and report.decoding[0].startswith(said)
        assert said in (folder / "summary.txt").read_text()
