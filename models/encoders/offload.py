"""Frozen encoders whose weights are in the host's memory while nobody needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Resident:
    """A frozen module that is on its device while it is used, or always.

    Weights are copied to the device before a use and dropped there after it; those on the host are
    what they were, so that nothing is copied back.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, offload: bool) -> None:
        """`module` is on the host, and frozen; without `offload` it moves to `device` for good."""
        self._module = module
        self._device = device
        self._offload = offload
        if not offload:
            module.to(device)
        elif device.type == "cuda":
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.pin_memory()

    @contextmanager
    def use(self) -> Iterator[None]:
        """The module's weights are on the device within the block."""
        if not self._offload:
            yield
            return
        tensors = [*self._module.parameters(), *self._module.buffers()]
        host = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self._device, non_blocking=True, copy=True)
            yield
        finally:
            for tensor, kept in zip(tensors, host, strict=True):
                tensor.data = kept
