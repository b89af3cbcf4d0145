"""A copy of the state on the host, made while training goes on.

The copy may overlap the next forward and backward, which only read parameters; the optimizer must
not write before it is done. Buffers are kept from save to save.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kinodit.trainer.parallel.parts import local_part, spread


class Stager:
    """Owns the buffers. One copy at a time: the next one overwrites what the last one made."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._stream: Any = None

    def begin(self, tensors: Mapping[str, Tensor]) -> Copy:
        """A copy of `tensors`, from the thread that trains.

        On an accelerator it is queued here, behind what was computed so far, on a stream of its
        own. On the host it is made by whoever calls `Copy.finish`.
        """
        parts = {name: local_part(tensor) for name, tensor in tensors.items()}
        for name, part in parts.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                pinned = part.is_cuda
                self._buffers[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned)
        device = next((part.device for part in parts.values() if part.is_cuda), None)
        copy = Copy(tensors, parts, self._buffers)
        if device is not None:
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                copy.make()
            copy.event = self._stream.record_event()
        return copy


class Copy:
    """One copy on its way."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> None:
        self._tensors, self._parts, self._buffers = tensors, parts, buffers
        self._over = threading.Event()
        self.event: Any = None

    def make(self) -> None:
        """Fill the buffers."""
        for name, part in self._parts.items():
            self._buffers[name].copy_(part, non_blocking=True)

    def finish(self) -> dict[str, Tensor]:
        """The copies, laid out as the tensors were. From the thread that writes them."""
        try:
            if self.event is None:
                self.make()
            else:
                self.event.synchronize()
        finally:
            self._over.set()
        return {name: spread(self._buffers[name], tensor) for name, tensor in self._tensors.items()}

    def give_up(self) -> None:
        """It will not be made, or was: nobody has to wait for it."""
        self._over.set()

    def wait(self) -> None:
        """Return when the tensors may change. From the thread that trains, before it updates."""
        if self.event is None:
            self._over.wait()
        else:
            torch.cuda.current_stream().wait_event(self.event)
