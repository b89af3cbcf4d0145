"""What a medium does to its decoder ends in the worker: it is replaced, and nothing waits."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError
from kinodit.data.decode import DecodedMedia, decode
from kinodit.data.record import Record
from kinodit.data.worker import DecodeWorker
from tests.data.clips import (
    clip_bytes,
    image_bytes,
    image_record,
    sound_bytes,
    sound_record,
    video_record,
)

CONFIG = DecodeConfig(
    height=40, width=56, num_frames=5, fps=8.0, use_audio=True, audio_channels=2, crop="random"
)


@pytest.fixture
def worker() -> Iterator[DecodeWorker]:
    made = DecodeWorker()
    yield made
    made.close()


@pytest.fixture(scope="module")
def clip() -> Record:
    return video_record("clip", clip_bytes(100, 24, onset=24_000), 100, 24.0, has_audio=True)


def same(ours: DecodedMedia, theirs: DecodedMedia) -> bool:
    if (ours.planes is None) != (theirs.planes is None):
        return False
    if ours.planes is not None and theirs.planes is not None:
        alike = torch.equal(ours.planes.y, theirs.planes.y)
        if not (alike and torch.equal(ours.planes.uv, theirs.planes.uv)):
            return False
        said = ours.planes.matrix, ours.planes.is_full
        if said != (theirs.planes.matrix, theirs.planes.is_full):
            return False
    for mine, other in ((ours.video, theirs.video), (ours.audio, theirs.audio)):
        if (mine is None) != (other is None):
            return False
        if mine is not None and other is not None and not torch.equal(mine, other):
            return False
    return replace(ours, video=None, audio=None, planes=None) == replace(
        theirs, video=None, audio=None, planes=None
    )


def test_a_worker_gives_the_same_bits(worker: DecodeWorker, clip: Record) -> None:
    still = image_record("still", image_bytes("jpg"), "jpg")
    sound = sound_record("sound", sound_bytes(3.0, 20_000), 3.0)
    for u in (0.0, 0.4, 0.9):
        for record in (clip, still, sound):
            ours = worker.decode(record, CONFIG, u, (u, 0.3))
            assert same(ours, decode(record, CONFIG, u, (u, 0.3))), record.key
    assert worker.num_started == 1
    with pytest.raises(DecodeError, match="sample 'clip', member 'mp4' cannot be decoded") as error:
        worker.decode(structs.replace(clip, members={"mp4": b"junk" * 99}), CONFIG, 0.0, (0.5, 0.5))
    assert error.value.key == "clip" and worker.num_started == 1


def test_what_was_decoded_stays_as_it_is(worker: DecodeWorker, clip: Record) -> None:
    """It lies in memory that the process can write: not in what it writes to next."""
    places = [number / 8 for number in range(6)]
    expected = [decode(clip, CONFIG, u, (u, u)) for u in places]
    held = [worker.decode(clip, CONFIG, u, (u, u)) for u in places]
    assert all(map(same, held, expected))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    held += [worker.decode(clip, CONFIG, u, (u, u)) for u in places]
    assert all(map(same, held, 2 * expected)) and worker.num_started == 2
    worker.close()
    assert all(map(same, held, 2 * expected))


def test_memory_is_used_again_once_nobody_has_it(worker: DecodeWorker, clip: Record) -> None:
    for u in (0.1, 0.5, 0.9, 0.3):
        media = worker.decode(clip, CONFIG, u, (0.5, 0.5))
        video, audio = media.video, media.audio
        assert video is not None and audio is not None
        first = video[:1]
        with pytest.raises(DecodeError):
            worker.decode(structs.replace(clip, members={"mp4": b"junk"}), CONFIG, u, (0.5, 0.5))
        del media, video, audio
        # A part of one tensor keeps the whole.
        assert torch.equal(first, video_of(clip, u)[:1])
    assert worker._rooms.num_made == 2


def video_of(clip: Record, u: float) -> torch.Tensor:
    video = decode(clip, CONFIG, u, (0.5, 0.5)).video
    assert video is not None
    return video


def test_samples_may_have_sizes_of_their_own(worker: DecodeWorker, clip: Record) -> None:
    for height in (8, 64, 24, 96):
        kept: Any = "yuv420" if height % 3 else "rgb"
        config = replace(CONFIG, height=height, num_frames=height // 8, pixels=kept)
        ours = worker.decode(clip, config, 0.5, (0.5, 0.5))
        assert same(ours, decode(clip, config, 0.5, (0.5, 0.5)))
    assert worker.num_started == 1


def test_a_worker_that_was_killed_is_replaced_at_its_place(
    worker: DecodeWorker, clip: Record
) -> None:
    expected = worker.decode(clip, CONFIG, 0.3, (0.5, 0.5))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    assert same(worker.decode(clip, CONFIG, 0.3, (0.5, 0.5)), expected)
    assert worker.num_started == 2


def test_a_worker_that_hangs_is_killed_and_the_sample_named(clip: Record) -> None:
    hasty, config = DecodeWorker(), replace(CONFIG, decode_limit_s=0.2)
    hasty.decode(image_record("still", image_bytes("png")), config, 0.0, (0.5, 0.5))
    pid = hasty.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(DecodeError, match=r"limit_s allows: its decoder hung and was killed"):
        hasty.decode(clip, config, 0.3, (0.5, 0.5))
    assert 4 < time.monotonic() - start < 30
    assert not Path(f"/proc/{pid}").exists()
    hasty.close()


def test_a_request_too_large_for_the_socket_does_not_hang_either(
    clip: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinodit.data.killable.GRACE_S", 1.0)
    # Long enough for a busy machine to decode the clip in the end.
    hasty, config = DecodeWorker(), replace(CONFIG, decode_limit_s=1.0)
    hasty.decode(image_record("still", image_bytes("png")), config, 0.0, (0.5, 0.5))
    assert hasty.pid is not None
    os.kill(hasty.pid, signal.SIGSTOP)
    large = structs.replace(clip, members={"mp4": bytes(clip.members["mp4"]) + bytes(8 << 20)})
    # The send is cut short, the worker replaced, and the sample decoded there.
    assert hasty.decode(large, config, 0.3, (0.5, 0.5)).video is not None
    assert hasty.num_started == 2
    hasty.close()


def test_a_sample_that_crashes_its_decoder_twice_is_refused(
    worker: DecodeWorker, clip: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The record kills whoever unpickles it, as a defect in a decoder would.
    deadly = structs.replace(clip, key="deadly", meta=Deadly())
    with pytest.raises(DecodeError, match="'deadly': its decoder crashed, and did so again"):
        worker.decode(deadly, CONFIG, 0.0, (0.5, 0.5))
    assert worker.num_started == 2
    assert worker.decode(clip, CONFIG, 0.0, (0.5, 0.5)).video is not None


class Deadly:
    """Ends the process that opens it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (9,)


def test_a_fault_of_ours_keeps_its_stack(worker: DecodeWorker, clip: Record) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)a worker failed:.*Traceback.*decode"):
        worker.decode(structs.replace(clip, meta=None), CONFIG, 0.0, (0.5, 0.5))


def test_no_process_and_no_file_is_left(clip: Record) -> None:
    def num_open() -> int:
        gc.collect()
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    DecodeWorker().close()
    before = num_open()
    for _ in range(3):
        worker = DecodeWorker()
        worker.decode(clip, CONFIG, 0.0, (0.5, 0.5))
        pid = worker.pid
        worker.close()
        assert not Path(f"/proc/{pid}").exists()
    assert num_open() == before
