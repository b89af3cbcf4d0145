"""Decoding in a process of its own: what a medium does to its decoder ends there.

A worker gets records over a socket and puts pixels and sound into memory that both sides see. Its
answers are JSON: nothing that comes from a process that has opened untrusted media is unpickled.
Workers are forked from a server that has imported what they need and nothing of the trainer's, so
that a new one is there in milliseconds.
"""

from __future__ import annotations

import json
import math
import mmap
import multiprocessing
import os
import resource
import signal
import traceback
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from threading import Timer
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinodit.data.colour import MATRICES, Planes
from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError, too_slow
from kinodit.data.decode import DecodedMedia, View, decode
from kinodit.data.picture import Crop
from kinodit.data.record import Record
from kinodit.data.sound import num_audio_samples

GRACE_S = 5.0
"""Beyond `decode_limit_s`, which a decoder that still answers keeps by itself."""
START_LIMIT_S = 120.0
"""How long the first answer may take: the server imports torch before it forks."""
MAX_ANSWER_BYTES = 1 << 20
_FLOAT_BYTES = 4


class DecodeWorker:
    """One process that decodes one sample at a time. For one thread.

    A process that dies or hangs is replaced before the next sample.
    """

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._link: Connection | None = None
        self._memory: mmap.mmap | None = None
        self.num_started = 0

    @property
    def pid(self) -> int | None:
        """The process's id while there is one."""
        return self._process.pid if self._process else None

    def decode(
        self, record: Record, config: DecodeConfig, window_u: float, crop_u: Crop
    ) -> DecodedMedia:
        """As `kinodit.data.decode.decode`, in the worker.

        A worker that dies is replaced, and the sample tried once more: it may have been killed by
        someone else, for want of memory say.

        Raises:
            DecodeError: as there; or the process died over this sample twice, or was killed because
                it did not answer in `decode_limit_s`.
        """
        where = f"sample {record.key!r}"
        for _ in range(2):
            answer = self._ask(record, config, window_u, crop_u)
            if answer is not None:
                break
        else:
            raise DecodeError(
                f"{where}: its decoder crashed, and did so again in a new process", record.key
            )
        if answer == {}:
            reason = f"{where}: {too_slow(config)}: its decoder hung and was killed"
            raise DecodeError(reason, record.key)
        if "fault" in answer:
            raise RuntimeError(f"a worker failed:\n{answer['fault']}")
        if "refused" in answer:
            raise DecodeError(answer["refused"], record.key)
        return self._received(answer, config)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        for part in (self._link, self._memory):
            if part is not None:
                part.close()
        self._process = self._link = self._memory = None

    def _ask(
        self, record: Record, config: DecodeConfig, window_u: float, crop_u: Crop
    ) -> dict[str, Any] | None:
        """The worker's answer; None if it died, {} if it was killed because it gave none."""
        limit_s = config.decode_limit_s + GRACE_S
        if self._process is None:
            self._start()
            limit_s += START_LIMIT_S
        assert self._link is not None
        try:
            self._send(self._room(config), (record, config, window_u, crop_u), limit_s)
            if not self._link.poll(limit_s):
                self.close()
                return {}
            answer: dict[str, Any] = json.loads(self._link.recv_bytes(MAX_ANSWER_BYTES))
            return answer
        except (EOFError, OSError, ValueError):
            self.close()
            return None

    def _send(self, descriptor: int, request: tuple[Any, ...], limit_s: float) -> None:
        """A process that was stopped takes nothing in: it is killed, and sending then fails."""
        assert self._link is not None and self._process is not None
        timer = Timer(limit_s, self._process.kill)
        timer.start()
        try:
            self._link.send((descriptor >= 0, *request))
            if descriptor >= 0:
                assert self._process.pid is not None
                send_handle(self._link, descriptor, self._process.pid)
        finally:
            timer.cancel()
            if descriptor >= 0:
                os.close(descriptor)

    def _room(self, config: DecodeConfig) -> int:
        """Makes memory for what `config` asks for; a descriptor of it if it is new, else -1."""
        num_bytes = sum(_sizes(config))
        if self._memory is not None and len(self._memory) >= num_bytes:
            return -1
        if self._memory is not None:
            self._memory.close()
        descriptor = os.memfd_create("kinodit-decode")
        os.ftruncate(descriptor, num_bytes)
        self._memory = mmap.mmap(descriptor, num_bytes)
        return descriptor

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="decode", daemon=True)
        self._process.start()
        theirs.close()
        self._link = ours
        self.num_started += 1

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
    """The worker: answers until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    memory: mmap.mmap | None = None
    while True:
        try:
            is_new, record, config, window_u, crop_u = link.recv()
            if is_new:
                descriptor = recv_handle(link)
                memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
                os.close(descriptor)
        except (EOFError, OSError):
            return
        assert memory is not None
        try:
            answer = _answer(decode(record, config, window_u, crop_u), memory, _sizes(config))
        except DecodeError as error:
            answer = {"refused": str(error)[:4000]}
        except Exception:
            # A fault of ours: told with its stack, and raised where the run can see it.
            link.send_bytes(json.dumps({"fault": traceback.format_exc()[-8000:]}).encode())
            raise
        link.send_bytes(json.dumps(answer).encode())


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
