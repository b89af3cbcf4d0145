"""The data stream of one data-parallel rank: decoded packs, step after step, decoded ahead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from kinodit.data.cache import BoundedCache
from kinodit.data.captions import choose_caption
from kinodit.data.config import DataConfig
from kinodit.data.container import DecodeError
from kinodit.data.decode import DecodedMedia, DecodedSample, decode, pick_view
from kinodit.data.manifest import Dataset
from kinodit.data.picture import CENTRE
from kinodit.data.plan import SampleRef, assign, plan
from kinodit.data.reader import ShardError, ShardReader
from kinodit.data.record import RecordMeta
from kinodit.data.spec import PlanSpec
from kinodit.models.errors import UserError
from kinodit.models.random import sample_generator, uniform

MIB = 1 << 20


class LoadError(UserError):
    """A sample that cannot be loaded; names the step, the sample, the shard and the reason."""


@dataclass(frozen=True)
class StepData:
    """One step of one rank: its packs (empty ones are fillers), and how long it was waited for.

    The samples' tensors may be shared with other steps: they must not be changed.
    """

    step: int
    packs: tuple[tuple[DecodedSample, ...], ...]
    wait_s: float


class Loader:
    """Iterates over the steps of a plan, from `start_step` on.

    What it yields is a function of the spec, the data and (dp_index, dp_size): threads,
    prefetching and caching decide when a sample is decoded, never what it is. There is no state
    to save but the step.
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
        """
        self._spec = spec
        self._datasets = datasets
        self._config = config
        self._dp = dp_index, dp_size
        self._next_step = start_step
        self._end_step = end_step
        self._readers = {name: ShardReader(dataset) for name, dataset in datasets.items()}
        self._cache = BoundedCache[str, _CachedSample](
            config.cache_mib * MIB, lambda cached: cached.media.num_bytes
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
        start = time.perf_counter()
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            packs = tuple(tuple(job.result() for job in pack) for pack in pending.packs)
            on_failure.pop_all()
        return StepData(pending.step, packs, time.perf_counter() - start)

    def close(self) -> None:
        """Stops decoding and waits for the threads to end. Further iteration is not possible."""
        self._end_step = 0
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for reader in self._readers.values():
            reader.close()

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
        jobs = tuple(
            tuple(self._pool.submit(self._load, step, ref) for ref in pack) for pack in packs
        )
        return _PendingStep(step, jobs)

    def _load(self, step: int, ref: SampleRef) -> DecodedSample:
        seed, key = self._spec.seed, ref.key(step)
        window_u, crop_u = uniform(sample_generator(seed, key, "window")), CENTRE
        if self._config.crop == "random":
            crop = sample_generator(seed, key, "crop")
            crop_u = uniform(crop), uniform(crop)
        found = self._cache.get(ref.sample_id)
        if found is None or found.media.view != pick_view(
            found.meta, self._config, window_u, crop_u
        ):
            try:
                record = self._readers[ref.dataset].read(ref.index)
                media = decode(record, self._config, window_u, crop_u)
            except (ShardError, DecodeError) as error:
                shard, _, _ = self._datasets[ref.dataset].locate(ref.index)
                raise LoadError(
                    f"{error} (step {step}, slot {ref.slot}, sample {ref.sample_id} in {shard})"
                ) from error
            found = _CachedSample(record.meta, media)
            self._cache.put(ref.sample_id, found)
        return DecodedSample(
            key=key,
            ref=ref,
            caption=choose_caption(found.meta.captions, seed, key),
            video=found.media.video,
            audio=found.media.audio,
            fps=found.media.fps,
            start_s=found.media.start_s,
            view=found.media.view,
            meta=found.meta,
        )


@dataclass(frozen=True)
class _CachedSample:
    """The view of a sample that was decoded last."""

    meta: RecordMeta
    media: DecodedMedia


@dataclass(frozen=True)
class _PendingStep:
    step: int
    packs: tuple[tuple[Future[DecodedSample], ...], ...]
