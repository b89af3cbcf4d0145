"""The data stream of one data-parallel rank: decoded packs, step after step, decoded ahead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Self

from kinodit.data.at_work import AtWork
from kinodit.data.config import DataConfig
from kinodit.data.decode import DecodedSample
from kinodit.data.manifest import Dataset
from kinodit.data.plan import SampleRef, assign, plan
from kinodit.data.quarantine import Replacement
from kinodit.data.remote import Traffic
from kinodit.data.samples import Loaded, LoadError, SampleSource, Settled, longest_s
from kinodit.data.shared_media import SharedMedia
from kinodit.data.spec import PlanSpec

__all__ = ["LoadError", "Loader", "StepData"]

ALIVE_EVERY_S = 1.0
"""Between two signs of life while a step is waited for."""
RUNS_PER_THREAD = 4
"""Runs of samples that a step is cut into for each thread."""


@dataclass(frozen=True)
class StepData:
    """One step of one rank: its packs (empty ones are fillers), and how long it was waited for.

    replaced: what took the place of samples of this rank's packs that cannot be used
    The samples' tensors may be shared with other steps: they must not be changed.
    """

    step: int
    packs: tuple[tuple[DecodedSample, ...], ...]
    wait_s: float
    replaced: tuple[Replacement, ...] = ()


class Loader:
    """Iterates over the steps of a plan, from `start_step` on.

    What it yields is a function of the spec, the data, what the ledger has settled and (dp_index,
    dp_size): threads, processes, prefetching and caching decide when a sample is decoded, never
    what it is. There is no state to save but the step.
    """

    def __init__(
        self,
        spec: PlanSpec,
        datasets: Mapping[str, Dataset],
        config: DataConfig,
        dp_index: int = 0,
        dp_size: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        settled: Settled | None = None,
        shared: SharedMedia | None = None,
        alive: Callable[[], None] = lambda: None,
        at_work: AtWork | None = None,
    ) -> None:
        """A loader of one rank.

        Args:
            spec: the frozen data order.
            datasets: by name, those of the spec.
            config: how to decode, how many threads, how far ahead.
            dp_index: data-parallel rank; ranks that share their samples (tensor and context
                parallel) share the index.
            dp_size: number of data-parallel ranks.
            start_step: the first step to yield.
            end_step: the step before which to stop; None never stops.
            settled: replacements of the run so far, which steps that are loaded again repeat.
            shared: where ranks of a node that share an index find what one of them has decoded.
            alive: is called each second while a step is waited for, as long as the limits of
                storage and decoders allow it to take.
            at_work: where threads that decode note their samples.
        """
        self._alive = alive
        self._limit_s = longest_s(config)
        self._spec = spec
        self._config = config
        self._dp = dp_index, dp_size
        self._next_step = start_step
        self._end_step = end_step
        self._is_closed = False
        self._samples = SampleSource(
            spec, datasets, config, settled or {}, dp_index, shared, at_work
        )
        self._pool = ThreadPoolExecutor(config.num_threads, thread_name_prefix="decode")
        self._ahead: deque[_PendingStep] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepData:
        """The next step's packs.

        Raises:
            LoadError: a sample of this step cannot be read or decoded.
        """
        while len(self._ahead) <= self._config.prefetch_steps and not self._is_over():
            self._ahead.append(self._submit(self._next_step))
            self._next_step += 1
        if not self._ahead:
            raise StopIteration
        pending = self._ahead.popleft()
        self._samples.forget(pending.step)
        start = time.perf_counter()
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            pending.wait(self._alive, self._limit_s, self._samples.tell_late)
            loaded = pending.loaded()
            on_failure.pop_all()
        samples = iter([found.sample for found in loaded])
        packs = tuple(tuple(islice(samples, size)) for size in pending.sizes)
        replaced = tuple([found.replacement for found in loaded if found.replacement is not None])
        return StepData(pending.step, packs, time.perf_counter() - start, replaced)

    def settle(self, data: StepData, replacements: Mapping[int, Replacement]) -> StepData:
        """`data` with the samples that `replacements` (by slot) name, loaded anew where others are.

        For ranks that load the same packs and did not find the same samples usable.

        Raises:
            LoadError: a sample that took a place elsewhere cannot be loaded here.
        """
        refs = {ref.slot: ref for pack in plan(self._spec, data.step).packs for ref in pack}
        replaced = {found.slot: found for found in data.replaced}

        def same(sample: DecodedSample) -> DecodedSample:
            slot = sample.ref.slot
            wanted = replacements.get(slot)
            if wanted is None or wanted.used == sample.ref.index:
                return sample
            found = self._samples.load(data.step, refs[slot], wanted)
            assert found.replacement is not None
            replaced[slot] = found.replacement
            return found.sample

        packs = tuple(tuple(map(same, pack)) for pack in data.packs)
        return replace(data, packs=packs, replaced=tuple(replaced.values()))

    @property
    def traffic(self) -> Traffic:
        """What was fetched from elsewhere so far, by this process."""
        return self._samples.traffic

    def close(self) -> None:
        """Stops decoding and waits for the threads to end. Further iteration is not possible."""
        self._end_step, self._is_closed = 0, True
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._samples.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _is_over(self) -> bool:
        return self._end_step is not None and self._next_step >= self._end_step

    def _submit(self, step: int) -> _PendingStep:
        packs = assign(plan(self._spec, step), *self._dp)
        refs = [ref for pack in packs for ref in pack]
        # Handing a sample to a thread costs as much as reading it: they go in runs, each thread
        # with several, so that none waits long for a slow one.
        length = max(1, len(refs) // (RUNS_PER_THREAD * self._config.num_threads))
        runs = tuple(
            self._pool.submit(self._load, step, refs[first : first + length])
            for first in range(0, len(refs), length)
        )
        return _PendingStep(step, tuple(map(len, packs)), runs)

    def _load(self, step: int, refs: Sequence[SampleRef]) -> list[Loaded]:
        loaded: list[Loaded] = []
        for ref in refs:
            if self._is_closed:
                break
            loaded.append(self._samples.load(step, ref))
        return loaded


@dataclass(frozen=True)
class _PendingStep:
    """Samples that are being loaded: `sizes` of the packs, and runs of samples one after another.

    A run ends with the first of its samples that cannot be loaded: in the order of the packs.
    """

    step: int
    sizes: tuple[int, ...]
    runs: tuple[Future[list[Loaded]], ...]

    def wait(
        self, alive: Callable[[], None], limit_s: float, tell_late: Callable[[], None]
    ) -> None:
        """Until all are there or one has failed; `alive`: see `Loader`."""
        give_up_s = time.monotonic() + limit_s
        # The last one first: when it is there, so are most. Whoever wakes for each run takes the
        # interpreter from those that load.
        for run in reversed(self.runs):
            while not run.done() and not self._has_failed():
                with suppress(TimeoutError):
                    run.exception(ALIVE_EVERY_S)
                    break
                tell_late()
                if time.monotonic() < give_up_s:
                    alive()

    def _has_failed(self) -> bool:
        return any(run.done() and run.exception() is not None for run in self.runs)

    def loaded(self) -> list[Loaded]:
        """What was waited for. Raises what the first that failed has raised."""
        return [found for run in self.runs for found in run.result()]
