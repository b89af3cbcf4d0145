"""The memory that a pass really takes: every storage that is made, until it is freed.

For checks of the estimate, on a CPU or on pretended tensors; all sizes are bytes.
"""

from __future__ import annotations

import itertools
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import kinodit

SETTLING_S = 0.003
"""Gloo's threads let go of what they sent soon after it arrived, but wait for the interpreter."""


class Watch(TorchDispatchMode):
    """Notes when storages come and go while it is active.

    What turns out to be a gradient, or was said to be something else, can be left out afterwards:
    see `peak`. `host_op` names ops whose results count as host memory.
    """

    def __init__(self, host_op: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._host_op = host_op
        self._events: list[tuple[int, int]] = []
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._apart: set[int] = set()
        self._host: set[int] = set()
        self._counter = itertools.count()
        self._sent = False

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of these, before, now or later."""
        for tensor in tensors:
            self._apart.add(self._note(tensor, 0))

    def marker(self) -> int:
        """The present moment, for `peak` and `level`."""
        return len(self._events)

    def level(self, moment: int | None = None, *, host: bool = False) -> int:
        """Bytes in use at a moment; now without one."""
        return sum(size for _, size in self._counted(moment, host))

    def peak(self, *, host: bool = False) -> int:
        """The most bytes in use at once."""
        return max(itertools.accumulate(size for _, size in self._counted(None, host)), default=0)

    def _counted(self, moment: int | None, host: bool) -> Iterator[tuple[int, int]]:
        for event in self._events[:moment]:
            if event[0] not in self._apart and (event[0] in self._host) == host:
                yield event

    def _note(self, tensor: Tensor, sign: int) -> int:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            return known[1]
        number, size = next(self._counter), storage.nbytes()

        def gone(_: object) -> None:
            self._events.append((number, -size * sign))
            if key in self._known and self._known[key][1] == number:
                del self._known[key]

        self._known[key] = weakref.ref(storage, gone), number
        self._events.append((number, size * sign))
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._sent:
            # Or what a message carried would count for as long as nobody yields to those threads.
            time.sleep(SETTLING_S)
        self._sent = func.namespace == "c10d"
        made = func(*args, **(kwargs or {}))
        if _is_of_fsdp():
            # Its buffers, and the parameters and gradients that it copies into and out of them.
            self.leave_out(x for x in tree_iter((args, kwargs, made)) if isinstance(x, Tensor))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                number = self._note(tensor, 1)
                if self._host_op and func.name() == self._host_op:
                    self._host.add(number)
        return made


FSDP_FILES = (
    "_fully_shard/_fsdp_collectives.py",
    "_fully_shard/_fsdp_param.py",
    "kinodit/trainer/parallel/shard.py",
)
"""Where FSDP2, and what sends its messages, handles parameters and gradients, never activations."""


PACKAGE = f"{kinodit.__path__[0]}/"
"""Where this package's own files are; an environment may lie in a folder of the same name."""


def _is_of_fsdp() -> bool:
    """Whether the op under way was called by FSDP2, for parameters or gradients."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file.endswith(FSDP_FILES):
            return True
        if file.startswith(PACKAGE):
            return False
        frame = frame.f_back
    return False
