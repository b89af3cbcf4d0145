"""Decoding in a process of its own, which puts pixels and sound into memory that both sides see."""

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
from kinodit.data.sound import num_audio_samples
from kinodit.models.errors import MissingExtraError, UserError

_FLOAT_BYTES = 4


class DecodeWorker:
    """One process that decodes one sample at a time. For one thread.

    A process that dies or hangs is replaced before the next sample.
    """

    def __init__(self) -> None:
        self._process = KillableProcess(_serve)
        self._memory: mmap.mmap | None = None

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

        def send(link: Connection, pid: int, is_new: bool) -> None:
            descriptor = self._room(config, is_new)
            try:
                said = structs.replace(record, members=dict.fromkeys(record.members, b""))
                request = descriptor >= 0, said, config, window_u, crop_u
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
        if "refused" in answer:
            raise DecodeError(answer["refused"], record.key)
        if "missing" in answer:
            raise UserError(answer["missing"])
        return self._received(answer, config)

    def close(self) -> None:
        """Ends the process."""
        self._process.close()
        if self._memory is not None:
            self._memory.close()
        self._memory = None

    def _room(self, config: DecodeConfig, is_new: bool) -> int:
        """Makes memory for what `config` asks for; a descriptor of it if it is new, else -1.

        `is_new`: the process is, and has no memory yet.
        """
        num_bytes = sum(_sizes(config))
        if self._memory is not None and len(self._memory) >= num_bytes and not is_new:
            return -1
        if self._memory is not None:
            self._memory.close()
        descriptor = os.memfd_create("kinodit-decode")
        os.ftruncate(descriptor, num_bytes)
        self._memory = mmap.mmap(descriptor, num_bytes)
        return descriptor

    def _received(self, answer: dict[str, Any], config: DecodeConfig) -> DecodedMedia:
        """A copy of what lies in the shared memory, checked: the other side is not trusted."""
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
        return DecodedMedia(
            video=self._copy(video, 0, torch.uint8),
            audio=self._copy(audio, _sizes(config)[0], torch.float32),
            fps=float(answer["fps"]),
            start_s=float(answer["start_s"]),
            view=View(int(first), (float(row), float(column))),
            planes=self._planes(answer["planes"], config),
            references=self._copy(references, sum(_sizes(config)[:2]), torch.uint8),
        )

    def _planes(self, said: list[Any] | None, config: DecodeConfig) -> Planes | None:
        if said is None:
            return None
        shape = [config.num_frames, config.height, config.width]
        half = [config.num_frames, 2, config.height // 2, config.width // 2]
        y, uv = self._copy(shape, 0, torch.uint8), self._copy(half, math.prod(shape), torch.uint8)
        assert y is not None and uv is not None
        if said[0] not in MATRICES:
            raise DecodeError(f"its decoder answered with colours of {said[0]!r}")
        return Planes(y, uv, said[0], bool(said[1]))

    def _copy(self, shape: list[int] | None, offset: int, dtype: torch.dtype) -> Tensor | None:
        if shape is None:
            return None
        assert self._memory is not None
        out = torch.empty(shape, dtype=dtype)
        view = np.frombuffer(self._memory, out.numpy().dtype, out.numel(), offset)
        out.numpy()[...] = view.reshape(shape)
        del view
        return out


def _sizes(config: DecodeConfig) -> tuple[int, int, int]:
    """Bytes of pixels, of sound and of reference pictures, at most."""
    sound = num_audio_samples(config) * config.audio_channels * _FLOAT_BYTES
    picture = config.height * config.width * 3
    pixels = -(-config.num_frames * picture // _FLOAT_BYTES) * _FLOAT_BYTES
    return pixels, max(sound, _FLOAT_BYTES), config.max_references * picture


def _serve(link: Connection) -> None:
    """The worker's process."""
    torch.set_num_threads(1)
    memory: mmap.mmap | None = None

    def receive(link: Connection) -> Any:
        nonlocal memory
        (is_new, said, *how), media = receive_parts(link)
        if is_new:
            descriptor = recv_handle(link)
            memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
            os.close(descriptor)
        members = dict(zip(said.members, media, strict=True))
        return structs.replace(said, members=members), *how

    def work(request: Any) -> Answer:
        record, config, window_u, crop_u = request
        assert memory is not None
        try:
            return _answer(decode(record, config, window_u, crop_u), memory, _sizes(config))
        except DecodeError as error:
            return {"refused": str(error)[:4000]}
        except MissingExtraError as error:
            return {"missing": str(error)}

    answers(link, receive, work)


def _answer(media: DecodedMedia, memory: mmap.mmap, sizes: tuple[int, int, int]) -> dict[str, Any]:
    planes, references = media.planes, media.references
    parts = [(media.video, 0), (media.audio, sizes[0]), (references, sizes[0] + sizes[1])]
    if planes is not None:
        parts += [(planes.y, 0), (planes.uv, planes.y.numel())]
    for tensor, offset in parts:
        if tensor is not None:
            flat = tensor.contiguous().numpy().reshape(-1)
            np.frombuffer(memory, flat.dtype, flat.size, offset)[...] = flat
    return {
        "video": list(media.video.shape) if media.video is not None else None,
        "audio": list(media.audio.shape) if media.audio is not None else None,
        "planes": [planes.matrix, planes.is_full] if planes is not None else None,
        "references": list(references.shape) if references is not None else None,
        "fps": media.fps,
        "start_s": media.start_s,
        "view": [media.view.first, *media.view.crop],
    }
