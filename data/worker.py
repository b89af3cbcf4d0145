"""Decoding in a process of its own, into memory that both sides see: nothing is copied."""

from __future__ import annotations

import math
import mmap
import os
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor

from kinodit.data.colour import MATRICES, Planes
from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError, too_slow
from kinodit.data.decode import DecodedMedia, View, decode
from kinodit.data.killable import (
    Answer,
    CrashedError,
    HungError,
    KillableProcess,
    answers,
    receive_parts,
    send_parts,
)
from kinodit.data.picture import Crop
from kinodit.data.record import Record
from kinodit.data.rooms import Room, Rooms
from kinodit.data.sound import num_audio_samples
from kinodit.models.errors import MissingExtraError, UserError

_FLOAT_BYTES = 4


class DecodeWorker:
    """One process that decodes one sample at a time. For one thread.

    A process that dies or hangs is replaced before the next sample.
    """

    def __init__(self) -> None:
        self._process = KillableProcess(_serve)
        self._rooms = Rooms()

    @property
    def pid(self) -> int | None:
        """The process's id while there is one."""
        return self._process.pid

    @property
    def num_started(self) -> int:
        """Processes so far."""
        return self._process.num_started

    def decode(
        self, record: Record, config: DecodeConfig, window_u: float, crop_u: Crop
    ) -> DecodedMedia:
        """As `kinodit.data.decode.decode`, in the worker.

        Raises:
            DecodeError: as there; or the process died over this sample twice, or was killed because
                it did not answer in `decode_limit_s`.
            UserError: PyAV is not installed.
        """
        where = f"sample {record.key!r}"
        taken: list[Room] = []

        def send(link: Connection, pid: int, is_new: bool) -> None:
            if is_new:
                # What the process before has filled stays with whoever has it.
                self._rooms = Rooms()
                taken.clear()
            room, descriptor = self._rooms.take(sum(_sizes(config)))
            taken.append(room)
            said = structs.replace(record, members=dict.fromkeys(record.members, b""))
            place = room.number, descriptor >= 0, self._rooms.gone()
            try:
                request = place, said, config, window_u, crop_u
                send_parts(link, request, list(record.members.values()))
                if descriptor >= 0:
                    send_handle(link, descriptor, pid)
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

        try:
            answer = self._process.ask(send, config.decode_limit_s)
        except CrashedError as error:
            reason = f"{where}: its decoder crashed, and did so again in a new process"
            raise DecodeError(reason, record.key) from error
        except HungError as error:
            reason = f"{where}: {too_slow(config)}: its decoder hung and was killed"
            raise DecodeError(reason, record.key) from error
        (room,) = taken
        if "refused" in answer:
            self._rooms.leave(room)
            raise DecodeError(answer["refused"], record.key)
        if "missing" in answer:
            raise UserError(answer["missing"])
        return _received(answer, config, self._rooms.hand_over(room))

    def close(self) -> None:
        """Ends the process. What it has decoded stays with whoever has it."""
        self._process.close()
        self._rooms = Rooms()


def _received(
    answer: dict[str, Any], config: DecodeConfig, room: NDArray[np.uint8]
) -> DecodedMedia:
    """What lies in `room` as `answer` says, which is checked: the other side is not trusted."""
    video, audio = answer["video"], answer["audio"]
    frames = video[0] if video else 0
    if video not in (None, [frames, config.height, config.width, 3]) or frames not in (
        0, 1, config.num_frames,
    ):  # fmt: skip
        raise DecodeError(f"its decoder answered with a video of {video}")
    if audio not in (None, [config.audio_channels, num_audio_samples(config)]):
        raise DecodeError(f"its decoder answered with a sound of {audio}")
    references = answer["references"]
    numbers = range(1, config.max_references + 1)
    if references is not None and references not in [
        [number, config.height, config.width, 3] for number in numbers
    ]:
        raise DecodeError(f"its decoder answered with reference pictures of {references}")
    first, row, column = answer["view"]
    sizes = _sizes(config)
    return DecodedMedia(
        video=_part(room, video, 0, np.uint8),
        audio=_part(room, audio, sizes[0], np.float32),
        fps=float(answer["fps"]),
        start_s=float(answer["start_s"]),
        view=View(int(first), (float(row), float(column))),
        planes=_planes(answer["planes"], config, room),
        references=_part(room, references, sum(sizes[:2]), np.uint8),
    )


def _planes(said: list[Any] | None, config: DecodeConfig, room: NDArray[np.uint8]) -> Planes | None:
    if said is None:
        return None
    shape = [config.num_frames, config.height, config.width]
    half = [config.num_frames, 2, config.height // 2, config.width // 2]
    y, uv = _part(room, shape, 0, np.uint8), _part(room, half, math.prod(shape), np.uint8)
    assert y is not None and uv is not None
    if said[0] not in MATRICES:
        raise DecodeError(f"its decoder answered with colours of {said[0]!r}")
    return Planes(y, uv, said[0], bool(said[1]))


def _part(
    room: NDArray[np.uint8],
    shape: list[int] | None,
    offset: int,
    dtype: type[np.uint8] | type[np.float32],
) -> Tensor | None:
    """The tensor of `shape` that begins at byte `offset`; it shares the room's memory."""
    if shape is None:
        return None
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return torch.from_numpy(room[offset : offset + num_bytes].view(dtype).reshape(shape))


def _sizes(config: DecodeConfig) -> tuple[int, int, int]:
    """Bytes of pixels, of sound and of reference pictures, at most."""
    sound = num_audio_samples(config) * config.audio_channels * _FLOAT_BYTES
    picture = config.height * config.width * 3
    pixels = -(-config.num_frames * picture // _FLOAT_BYTES) * _FLOAT_BYTES
    return pixels, max(sound, _FLOAT_BYTES), config.max_references * picture


def _serve(link: Connection) -> None:
    """The worker's process."""
    torch.set_num_threads(1)
    rooms: dict[int, mmap.mmap] = {}

    def receive(link: Connection) -> Any:
        ((number, is_new, gone), said, *how), media = receive_parts(link)
        for old in gone:
            rooms.pop(old, None)
        if is_new:
            descriptor = recv_handle(link)
            rooms[number] = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
            os.close(descriptor)
        members = dict(zip(said.members, media, strict=True))
        return rooms[number], structs.replace(said, members=members), *how

    def work(request: Any) -> Answer:
        memory, record, config, window_u, crop_u = request
        room = np.frombuffer(memory, np.uint8)
        try:
            media = decode(record, config, window_u, crop_u, room)
        except DecodeError as error:
            return {"refused": str(error)[:4000]}
        except MissingExtraError as error:
            return {"missing": str(error)}
        return _answer(media, room, _sizes(config))

    answers(link, receive, work)


def _answer(
    media: DecodedMedia, room: NDArray[np.uint8], sizes: tuple[int, int, int]
) -> dict[str, Any]:
    """What is said of `media`, whose pixels lie in `room`; the rest of them is put there."""
    planes, references = media.planes, media.references
    for tensor, offset in ((media.audio, sizes[0]), (references, sizes[0] + sizes[1])):
        if tensor is not None:
            flat = tensor.contiguous().numpy().reshape(-1).view(np.uint8)
            room[offset : offset + flat.size] = flat
    return {
        "video": list(media.video.shape) if media.video is not None else None,
        "audio": list(media.audio.shape) if media.audio is not None else None,
        "planes": [planes.matrix, planes.is_full] if planes is not None else None,
        "references": list(references.shape) if references is not None else None,
        "fps": media.fps,
        "start_s": media.start_s,
        "view": [media.view.first, *media.view.crop],
    }
