"""What torch itself sends between ranks: the truth that counters are held to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "recv_": "transfer",
}


class Wire(TorchDispatchMode):
    """Counts every collective and every receive by kind, whoever asks for it.

    unknown: names of ops of the process group that it has no size for
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.messages: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.unknown: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        space, _, name = str(func).partition(".")
        if space == "c10d":
            self._count(name.partition(".")[0], args)
        elif space.startswith("_c10d"):
            self.unknown.append(str(func))
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "send":
            return  # counted where it arrives
        if name not in KINDS:
            self.unknown.append(name)
            return
        group = ProcessGroup.unbox(args[1 if name in ("allreduce_", "recv_") else 2])
        size, rank = group.size(), group.rank()
        if size > 1:
            self.messages[KINDS[name]] += 1
            self.num_bytes[KINDS[name]] += _received(name, args, size, rank)


def _received(name: str, args: Any, size: int, rank: int) -> int:
    first: Tensor = args[0][0] if name in ("allreduce_", "recv_") else args[0]
    if name == "_allgather_base_":
        return first.nbytes - int(args[1].nbytes)
    if name == "_reduce_scatter_base_":
        return first.nbytes * (size - 1)
    if name == "allreduce_":
        return 2 * (first.nbytes * (size - 1) // size)
    if name == "alltoall_base_":
        rows: list[int] = list(args[3]) or [1] * size
        return first.nbytes // max(sum(rows), 1) * (sum(rows) - rows[rank])
    return first.nbytes
