"""A cache of blocks: bounded, whole, shared, and nobody waits for the dead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from kinodit.data.shard_cache import STALE_S, BlockCache
from kinodit.data.storage import StorageError

SIZE = 1000


def content(name: str) -> bytes:
    return (name.encode() * SIZE)[:SIZE]


def hammer(folder: str, order: Iterable[int], log: str) -> None:
    cache = BlockCache(Path(folder), 20 * SIZE)
    for number in order:
        name = f"b{number}"

        def fetch(name: str = name) -> bytes:
            with Path(log).open("a") as file:
                file.write(f"{name}\n")
            time.sleep(0.002)
            return content(name)

        assert cache.block(name, fetch) == content(name)


def test_processes_share_blocks(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    orders = [[(start + 3 * i) % 16 for i in range(48)] for start in range(3)]
    processes = [
        context.Process(target=hammer, args=(str(tmp_path / "c"), order, str(log)))
        for order in orders
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    fetched = log.read_text().split()
    assert sorted(fetched) == sorted({f"b{n}" for order in orders for n in order})


def test_it_is_bounded_and_lets_go_of_what_was_unused_the_longest(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", 10 * SIZE)
    asked: list[str] = []

    def get(number: int) -> None:
        name = f"b{number}"

        def fetch() -> bytes:
            asked.append(name)
            return content(name)

        assert cache.block(name, fetch) == content(name)

    for number in range(10):
        get(number)
        os.utime(tmp_path / "c" / "blocks" / f"b{number}", (1000 + number, 1000 + number))
    fresh = BlockCache(tmp_path / "c", 10 * SIZE)
    fresh.block("b0", lambda: b"never")
    get(10)
    assert cache.num_bytes <= 10 * SIZE
    asked.clear()
    get(0)
    assert asked == [], "it was used last"
    get(1)
    assert asked == ["b1"]
    for number in range(100):
        get(number)
        assert cache.num_bytes <= 10 * SIZE
    huge = cache.block("huge", lambda: bytes(11 * SIZE))
    assert len(huge) == 11 * SIZE and cache.num_bytes <= 10 * SIZE


def test_a_part_of_a_block_is_read_and_the_whole_is_kept(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", 20 * SIZE)
    whole = bytes(n % 251 for n in range(SIZE))
    asked: list[int] = []

    def fetch() -> bytes:
        asked.append(1)
        return whole

    for first, size in ((3, 5), (0, 1), (700, 300), (SIZE - 2, 2)):
        assert cache.block("b1", fetch, first, size) == whole[first : first + size]
    assert cache.block("b1", fetch) == whole and asked == [1]
    assert cache.block("b1", fetch, SIZE - 2, 9) == whole[-2:], "no more than there is"


def hold(folder: str, ready: str) -> None:
    def fetch() -> bytes:
        Path(ready).touch()
        time.sleep(600)
        return b""

    BlockCache(Path(folder), 20 * SIZE).block("b1", fetch)


def test_a_process_that_is_killed_while_it_fetches_holds_nobody_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=hold, args=(str(tmp_path / "c"), str(tmp_path / "ready")))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    cache = BlockCache(tmp_path / "c", 20 * SIZE)
    start = time.monotonic()
    assert cache.block("b1", lambda: content("b1")) == content("b1")
    assert time.monotonic() - start < 5


def test_half_a_block_is_never_read_and_is_cleared_up(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", 20 * SIZE)
    part = tmp_path / "c" / "blocks" / ".part-x"
    part.write_bytes(b"half")
    old = time.time() - STALE_S - 10
    os.utime(part, (old, old))
    cache.block("b1", lambda: content("b1"))
    assert not part.exists() and cache.num_bytes == SIZE


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", 20 * SIZE)

    def fail() -> bytes:
        raise StorageError("down")

    with pytest.raises(StorageError, match="down"):
        cache.block("b1", fail)
    assert cache.num_bytes == 0
    assert cache.block("b1", lambda: content("b1")) == content("b1")


def test_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StorageError, match=r"cache_dir.*choose another"):
        BlockCache(tmp_path / "link", SIZE)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(StorageError, match="choose another"):
        BlockCache(tmp_path / "real", SIZE)
