"""megatron-core's distributed optimizer on devices and in formats that it does not name.

It asks for CUDA by name where it allocates buffers and where it sorts parameters by format, and
nowhere in between: which numbers go where does not depend on the device. On CPUs its code runs as
it is, with these names answered for it; on CUDA it runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

KINDS = {
    torch.float64: "torch.cuda.FloatTensor",
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}
"""What a parameter is called, by its format. float64, for proofs, is treated as float32."""


class _Answers(TorchFunctionMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        settings = dict(kwargs or {})
        if func is torch.Tensor.type and len(args) == 1 and not settings:
            return KINDS[args[0].dtype]
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if settings.get("device") == "cuda":
            settings["device"] = self._device
        return func(*args, **settings)


@contextmanager
def named_as_cuda(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it, what megatron-core says of CUDA and float32 is said of `device` and `dtype`."""
    if device.type == "cuda" and dtype == torch.float32:
        yield
        return
    current = mock.patch.object(torch.cuda, "current_device", return_value=device)
    with current, _Answers(device):
        yield
