"""Tensors that have a size and nothing else, and what autograd keeps of them.

A `Shadow` stands for a tensor, a `Tape` for the ops of a pass. Python frees a storage when the last
reference goes, as it frees a tensor's memory: code that holds shadows where the model holds tensors
therefore has the model's peak. The backward runs nodes in the order in which torch's engine does.
Nothing is computed; a block takes a millisecond, whatever its size.

All sizes are bytes.
"""

from __future__ import annotations

import heapq
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

SMALL_BYTES = 1 << 14
"""Tensors below this are not offloaded: `trainer/parallel/remat.py: SMALL_BYTES`."""


@dataclass
class Meter:
    """Bytes in use, the most since `restart`, and all that were ever made."""

    current: int = 0
    peak: int = 0
    made: int = 0

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.current


class Storage:
    """Memory that is in use for as long as somebody refers to it."""

    __slots__ = ("__weakref__", "meter", "nbytes")

    def __init__(self, meter: Meter, nbytes: int) -> None:
        self.meter, self.nbytes = meter, nbytes
        meter.current += nbytes
        meter.made += nbytes
        meter.peak = max(meter.peak, meter.current)

    def __del__(self) -> None:
        self.meter.current -= self.nbytes


Back = Callable[[list[Storage | None], list[Storage]], Sequence[Storage | None]]
"""(gradients of the outputs, what was kept) -> gradients of the inputs."""


class Node:
    """An op in the graph: `outputs` gradients come in, one for each parent goes out."""

    __slots__ = ("back", "order", "outputs", "parents", "saved")

    def __init__(
        self,
        order: int,
        parents: list[tuple[Node, int] | None],
        outputs: int,
        saved: list[Kept],
        back: Back,
    ) -> None:
        self.order, self.parents, self.outputs = order, parents, outputs
        self.saved, self.back = saved, back


@dataclass(frozen=True)
class Shadow:
    """A tensor: `nbytes` of `storage`, the `slot`-th output of `node` (None: needs no gradient)."""

    nbytes: int
    storage: Storage
    node: Node | None = None
    slot: int = 0


@dataclass
class Frame:
    """A block that is computed again in the backward.

    again:      its forward; refers to its inputs
    selective:  whether results of matrix products and attention are kept in `cache`
    num_saved:  tensors that its forward would have kept
    recomputed: those tensors, once they are there again
    """

    again: Callable[[], object]
    selective: bool
    num_saved: int = 0
    cache: deque[Storage] = field(default_factory=deque)
    recomputed: dict[int, Storage] = field(default_factory=dict)
    is_again: bool = False


class _Enough(Exception):
    """All that a frame has to recompute is there."""


@dataclass(frozen=True)
class _Later:
    frame: Frame
    index: int


Kept = Storage | _Later
"""What stands for a kept tensor: itself, its copy on the host, or a promise to compute it again."""


class Tape:
    """Ops, what they keep, and the backward through them.

    meter: the device's memory; host: that of tensors moved to the host
    copies_back: whether an offloaded tensor is copied to be used (a CPU's is used where it is)
    """

    def __init__(self, copies_back: bool = True) -> None:
        self.meter, self.host = Meter(), Meter()
        self.copies_back = copies_back
        self.frame: Frame | None = None
        self.num_nodes = 0
        self._is_offloading = False
        self._on_host: dict[tuple[int, int], tuple[weakref.ref[Storage], Storage]] = {}

    def new(self, nbytes: int) -> Storage:
        """Fresh memory."""
        return Storage(self.meter, nbytes)

    def leaf(self, nbytes: int) -> Shadow:
        """A tensor without a gradient."""
        return Shadow(nbytes, self.new(nbytes))

    def product(self, *nbytes: int, times: int = 1) -> list[Storage]:
        """Results of a matrix product or of attention: kept where those are.

        Made `times` over, one after the other; only where they are kept are all there at once.
        """
        frame = self.frame
        if frame is None or not frame.selective:
            self.meter.made += (times - 1) * sum(nbytes)
            return [self.new(size) for size in nbytes]
        if frame.is_again:
            return [frame.cache.popleft() for _ in nbytes]
        made = [self.new(size * times) for size in nbytes]
        frame.cache.extend(made)
        return made

    def op(
        self,
        inputs: Sequence[Shadow],
        outputs: Sequence[tuple[int, Storage]],
        saved: Sequence[Storage | Shadow],
        back: Back,
    ) -> list[Shadow]:
        """Note an op whose results are there: (size, storage) of each."""
        parents = [None if x.node is None else (x.node, x.slot) for x in inputs]
        kept = [self._keep(x) for x in saved]
        node = Node(self.num_nodes, parents, len(outputs), kept, back)
        self.num_nodes += 1
        return [Shadow(size, storage, node, slot) for slot, (size, storage) in enumerate(outputs)]

    def _keep(self, x: Storage | Shadow) -> Kept:
        storage, size = (x, x.nbytes) if isinstance(x, Storage) else (x.storage, x.nbytes)
        frame = self.frame
        if frame is not None:
            if not frame.is_again:
                frame.num_saved += 1
                return _Later(frame, frame.num_saved - 1)
            frame.recomputed[len(frame.recomputed)] = storage
            if len(frame.recomputed) == frame.num_saved:
                raise _Enough
            return storage
        if not self._is_offloading or size < SMALL_BYTES:
            return storage
        # One copy of what several ops keep; tensors of other shapes are other tensors.
        known = self._on_host.get((id(storage), size))
        if known is not None and known[0]() is not None:
            return known[1]
        copy = Storage(self.host, size)
        self._on_host[id(storage), size] = weakref.ref(storage), copy
        return copy

    def recompute(self, forward: Callable[[], T], selective: bool) -> T:
        """`forward()`, keeping what it refers to; computed again in the backward."""
        frame = Frame(forward, selective)
        self.frame = frame
        try:
            return forward()
        finally:
            self.frame = None

    def offload(self, forward: Callable[[], T]) -> T:
        """`forward()`, with what it keeps on the host."""
        self._is_offloading = True
        try:
            return forward()
        finally:
            self._is_offloading = False
            self._on_host.clear()

    def _unpack(self, kept: Kept) -> Storage:
        if isinstance(kept, _Later):
            frame = kept.frame
            if not frame.is_again:
                self._run_again(frame)
            return frame.recomputed.pop(kept.index)
        if kept.meter is self.host and self.copies_back:
            return self.new(kept.nbytes)
        return kept

    def _run_again(self, frame: Frame) -> None:
        frame.is_again, self.frame = True, frame
        try:
            frame.again()
        except _Enough:
            pass
        finally:
            self.frame = None

    def backward(self, outputs: Sequence[Shadow], on_node: Callable[[int], None]) -> None:
        """From `outputs`, newest node first; `on_node` is told each node's order beforehand."""
        waiting: dict[int, tuple[Node, list[Storage | None]]] = {}
        heap: list[int] = []

        def add(node: Node, slot: int, grad: Storage) -> None:
            if node.order not in waiting:
                waiting[node.order] = node, [None] * node.outputs
                heapq.heappush(heap, -node.order)
            grads = waiting[node.order][1]
            # A second gradient is added to the first, in place.
            grads[slot] = grad if grads[slot] is None else grads[slot]

        for x in outputs:
            if x.node is not None:
                add(x.node, x.slot, self.new(x.nbytes))
        del x, outputs
        while heap:
            node, grads = waiting.pop(-heapq.heappop(heap))
            on_node(node.order)
            saved = [self._unpack(kept) for kept in node.saved]
            made = list(node.back(grads, saved))
            grads, saved, node.saved = [], [], []
            for parent in node.parents[::-1]:
                grad = made.pop()
                if parent is not None and grad is not None:
                    add(*parent, grad)
            del grad
