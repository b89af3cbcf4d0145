"""megatron-core's distributed optimizer and dispatcher on devices and in formats they do not name.

They ask for CUDA by name where they allocate buffers, sort parameters by format and copy counts on
a stream of their own, and nowhere in between: which numbers go where does not depend on the device.
On CPUs their code runs as it is, with these names answered for it; on CUDA it runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kinodit.trainer.engine.megatron.core import token_dispatcher

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


class _NoStream:
    """In the place of a CUDA stream and of its events: there is nothing to wait for."""

    def wait_stream(self, other: object) -> None:
        """Nothing runs beside."""

    def record_event(self) -> _NoStream:
        """What has been asked for is done."""
        return self

    def synchronize(self) -> None:
        """It is."""


def _on_host(
    tensor: Tensor | None, as_numpy: bool = False, record_stream: bool = False
) -> Tensor | Any:
    """`maybe_move_tensor_to_cpu` of what is there already."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


@contextmanager
def without_streams(device: torch.device) -> Iterator[None]:
    """Within it, what megatron-core's dispatchers ask of CUDA is answered for `device`."""
    if device.type == "cuda":
        yield
        return
    answers: dict[str, Callable[..., Any]] = {
        "current_device": lambda: device,
        "current_stream": _NoStream,
        "stream": nullcontext,
        "Stream": _NoStream,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(
            mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _on_host)
        )
        yield
