"""A bounded memory of things that are used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """The most recently used values, of at most `max_bytes` together. Threads may share it.

    A cache decides how long something takes, never what it is: every value must be a pure
    function of its key. Values are shared, so whoever gets one must not change it.
    """

    def __init__(self, max_bytes: int, num_bytes: Callable[[V], int]) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = num_bytes
        self._values: OrderedDict[K, V] = OrderedDict()
        self._held_bytes = 0
        self._lock = Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of all values that are held."""
        return self._held_bytes

    def get(self, key: K) -> V | None:
        """The value of `key`, if it is still held."""
        if not self._max_bytes:
            return None
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: K, value: V) -> None:
        """Holds `value`, and lets go of the longest unused ones that no longer fit beside it."""
        if not self._max_bytes:
            return
        size = self._num_bytes(value)
        if size > self._max_bytes:
            return
        with self._lock:
            if key in self._values:
                self._held_bytes -= self._num_bytes(self._values.pop(key))
            self._values[key] = value
            self._held_bytes += size
            while self._held_bytes > self._max_bytes:
                _, oldest = self._values.popitem(last=False)
                self._held_bytes -= self._num_bytes(oldest)
