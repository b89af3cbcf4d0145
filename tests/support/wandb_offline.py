"""Reads a wandb offline run back, independently of what wrote it.

`run-ID.wandb` is wandb's datastore: a 7-byte header (":W&B", magic 0xBEE1, version 0), then the
LevelDB log format: blocks of 32 KiB of records (crc32 u4, length u2, type u1: full, first, middle,
last), each whole payload one `wandb_internal_pb2.Record`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """id; config: as JSON values; history: one dict per logged step; finished: an exit record."""

    id: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


def records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    assert data[:4] == b":W&B" and struct.unpack("<HB", data[4:7]) == (0xBEE1, 0)
    position, payload = 7, b""
    while position + 7 <= len(data):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            position += room
            continue
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def read_offline_run(folder: Path) -> OfflineRun:
    (path,) = folder.glob("run-*.wandb")
    run = OfflineRun()
    for record in records(path):
        which = record.WhichOneof("record_type")
        if which == "run":
            run.id, run.project = record.run.run_id, record.run.project
            for item in record.run.config.update:
                run.config[item.key] = json.loads(item.value_json)
        elif which == "history":
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            run.history.append(row)
        elif which == "exit":
            run.finished = True
    return run


def offline_runs(run_dir: Path) -> list[Path]:
    """The folders of a run's parts, oldest first."""
    return sorted((run_dir / "wandb").glob("offline-run-*"))
