"""Training from shards that lie elsewhere, over a network that misbehaves: the same curve."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kinodit.launch.cli import main
from tests.support.recipes import tiny_recipe, write_dataset
from tests.support.servers import FileServer, nginx, s3

# From the first request on: a whole shard is fetched by one where blocks are kept.
SCRIPT = ["503", "stall", "cut", "reset", "garbage", "500", "", "", ""]
# A stall costs one limit. The server shares this process's interpreter: on a busy machine a good
# answer may take longer than that any number of times, which must not be what ends a run.
IMPATIENT = (
    "data.storage.attempt_limit_s=1", "data.storage.wait_s=0.01", "data.storage.max_wait_s=0.1",
    "data.storage.attempts=100", "data.prefetch_steps=1",
)  # fmt: skip


def scripted(number: int) -> str:
    """What a request meets. Bytes are wrong once: a sample that is wrong twice is a bad one."""
    fault = SCRIPT[number % len(SCRIPT)]
    return "500" if fault == "garbage" and number >= len(SCRIPT) else fault


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("remote")
    write_dataset(made)
    return made


def losses(root: Path, name: str, place: str, *overrides: str) -> list[float]:
    recipe = tiny_recipe(root, root / "data")
    wanted = [f"run.name={name}", f"data.datasets.clips.path={place}", *overrides]
    assert main(["train", str(recipe), *wanted]) == 0
    lines = (root / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert not (root / "runs" / name / "quarantine.jsonl").exists()
    trained = [row for row in rows if row["kind"] == "train"]
    assert all(row["data_wait_s"] >= 0 for row in trained)
    assert all(("fetched_per_used" in row) == ("://" in place) for row in trained)
    return [row["loss"] for row in rows if row["kind"] == "train"]


@contextmanager
def place(kind: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    data = root / "data"
    with ExitStack() as stack:
        if kind == "http":
            server = FileServer(data, scripted)
            stack.callback(server.close)
            yield server.url
            # Every fault came up, whether each sample was asked for or each block.
            assert {fault for *_, fault in server.requests} >= {*SCRIPT}
        elif kind == "s3":
            script = ["", "503", "stall", "", "cut", ""]
            yield stack.enter_context(s3(data, monkeypatch, lambda n: script[n] if n < 6 else ""))
        else:
            yield stack.enter_context(nginx(data, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("cache_gib", [0, 1])
@pytest.mark.parametrize("kind", ["http", "nginx", "s3"])
def test_the_curve_is_that_of_local_shards(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cache_gib: int
) -> None:
    local = losses(root, f"local-{kind}-{cache_gib}", str(root / "data"))
    assert len(local) == 6
    cache = f"data.storage.cache_dir={tmp_path / 'cache'}"
    with place(kind, root, tmp_path, monkeypatch) as url:
        options = (*IMPATIENT, cache, f"data.storage.cache_gib={cache_gib}")
        assert losses(root, f"{kind}-{cache_gib}", url, *options) == local
