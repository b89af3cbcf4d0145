"""One sample of a step: read, decoded, with the caption of this step; or what takes its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

from msgspec import Struct

from kinodit.data.at_work import AtWork
from kinodit.data.cache import BoundedCache
from kinodit.data.captions import choose_caption, with_references
from kinodit.data.config import DataConfig, DecodeConfig
from kinodit.data.container import DecodeError
from kinodit.data.decode import DecodedSample, pick_view
from kinodit.data.decoders import Decoders
from kinodit.data.killable import GRACE_S
from kinodit.data.latents import Encoded, LatentCache
from kinodit.data.manifest import Dataset
from kinodit.data.picture import CENTRE, Crop
from kinodit.data.plan import SampleRef
from kinodit.data.quarantine import Fault, QuarantineError, Replacement, instead, substitute
from kinodit.data.reader import SampleError, ShardError, ShardReader
from kinodit.data.record import RecordMeta
from kinodit.data.remote import Traffic
from kinodit.data.shapes import Shape
from kinodit.data.shared_media import DecodedRecord, SharedMedia
from kinodit.data.spec import PlanSpec
from kinodit.data.stream import StreamedDataset, StreamReader
from kinodit.models.errors import UserError
from kinodit.models.random import sample_generator, uniform
from kinodit.models.tokens import SampleKey

MIB = 1 << 20
Settled = Mapping[tuple[int, int], Replacement]
"""(step, slot) -> what took that place when the step was first loaded."""


class LoadError(UserError):
    """A sample that cannot be loaded; names the step, the sample, the shard and the reason."""


class Loaded(Struct, frozen=True, gc=False):
    """A sample, and the replacement that made it this one; None if it is what the plan asks for."""

    sample: DecodedSample
    replacement: Replacement | None


class SampleSource:
    """Loads samples by their place in the plan. Threads share it.

    What it gives is a function of spec, data and `settled`: caches and workers decide when a sample
    is decoded, never what it is.
    """

    def __init__(
        self,
        spec: PlanSpec,
        datasets: Mapping[str, Dataset],
        config: DataConfig,
        settled: Settled,
        dp_index: int = 0,
        shared: SharedMedia | None = None,
        at_work: AtWork | None = None,
    ) -> None:
        """Arguments as of `kinodit.data.loader.Loader`."""
        self._shared = shared
        self._spec = spec
        self._datasets = datasets
        self._config = config
        # Only what decoding depends on: hashable, and cheap to change for a sample.
        self._decoding = DecodeConfig(
            **{part.name: getattr(config, part.name) for part in fields(DecodeConfig)}
        )
        self._settled = settled
        # Asked for each sample.
        self._is_drawn = config.window == "random" or config.crop == "random"
        self._is_kept = config.cache_mib > 0 or shared is not None
        self._readers: dict[str, ShardReader | StreamReader] = {
            name: StreamReader(dataset, spec.seed, dp_index)
            if isinstance(dataset, StreamedDataset)
            else ShardReader(dataset)
            for name, dataset in datasets.items()
        }
        self._cache = BoundedCache[str, DecodedRecord](
            config.cache_mib * MIB, lambda cached: cached.media.num_bytes
        )
        self._caches = {
            name: LatentCache(Path(config.datasets[name].cache), dataset, config)
            for name, dataset in datasets.items()
            if name in config.datasets and config.datasets[name].cache
        }
        self.decoders = Decoders(config.workers, at_work)

    def load(self, step: int, ref: SampleRef, settled: Replacement | None = None) -> Loaded:
        """The sample at a place of a step, or its substitute.

        `settled`: what other ranks found to take this place; without it, what the ledger says.

        Raises:
            LoadError: the sample cannot be used and `data.on_error` is "fail", no substitute can be
                used either, or the storage does not answer.
        """
        if settled is None and self._settled:
            settled = self._settled.get((step, ref.slot))
        faults: list[Fault] = []
        now = ref
        if settled is not None:
            if (settled.dataset, settled.wanted) != (ref.dataset, ref.index):
                raise LoadError(
                    f"the quarantine ledger is of another data order: at step {step}, slot "
                    f"{ref.slot} it replaced {settled.dataset}:{settled.wanted}, and the plan has "
                    f"{ref.sample_id} there"
                )
            faults = list(settled.faults)
            now = instead(self._spec, ref, settled.used)
        while True:
            try:
                sample = self._sample(step, now)
                break
            except (SampleError, DecodeError) as error:
                if self._config.on_error == "fail":
                    raise self._load_error(error, step, now) from error
                faults.append(self._fault(now, error))
                now = self._next(step, ref, faults, error)
            except ShardError as error:
                raise self._load_error(error, step, now) from error
        if not faults:
            return Loaded(sample, None)
        found = Replacement(step, ref.slot, ref.dataset, ref.index, now.index, tuple(faults))
        return Loaded(sample, found)

    @property
    def traffic(self) -> Traffic:
        """What was fetched from elsewhere so far."""
        return sum((reader.traffic for reader in self._readers.values()), Traffic())

    def tell_late(self) -> None:
        """Says which samples threads have been decoding for longer than they may."""
        self.decoders.tell_late(self._decoding)

    def forget(self, before_step: int) -> None:
        """Lets go of what is shared for earlier steps."""
        if self._shared is not None:
            self._shared.forget(before_step)

    def close(self) -> None:
        """Closes files and ends worker processes; no thread may be loading any more."""
        if self._shared is not None:
            self._shared.close()
        for reader in self._readers.values():
            reader.close()
        for cache in self._caches.values():
            cache.close()
        self.decoders.close()

    def _next(
        self, step: int, ref: SampleRef, faults: list[Fault], error: SampleError | DecodeError
    ) -> SampleRef:
        limit = self._config.quarantine.max_attempts
        if len(faults) >= limit:
            raise LoadError(
                f"{len(faults)} samples in a row cannot be used at step {step}, slot {ref.slot} "
                f"(data.quarantine.max_attempts is {limit}); the last reason: {error}"
            ) from error
        tried = [fault.index for fault in faults]
        try:
            return substitute(self._spec, self._datasets[ref.dataset], step, ref, tried)
        except QuarantineError as none_left:
            raise LoadError(f"{error}; {none_left}") from none_left

    def _fault(self, ref: SampleRef, error: SampleError | DecodeError) -> Fault:
        dataset = self._datasets[ref.dataset]
        shard, offset, _ = dataset.span(ref.index)
        return Fault(ref.index, dataset.place_of(shard), offset, error.key, str(error))

    def _load_error(self, error: UserError, step: int, ref: SampleRef) -> LoadError:
        dataset = self._datasets[ref.dataset]
        shard = dataset.place_of(dataset.span(ref.index)[0])
        return LoadError(
            f"{error} (step {step}, slot {ref.slot}, sample {ref.sample_id} in {shard})"
        )

    def _sample(self, step: int, ref: SampleRef) -> DecodedSample:
        key = ref.key(step)
        config = self._decoding if ref.shape is None else sized(self._decoding, ref.shape)
        window_u, crop_u = 0.0, CENTRE
        if self._is_drawn:
            window_u, crop_u = self._draw(key)
        if self._caches:
            kept = self._from_cache(ref, config, window_u, crop_u)
            if kept is not None:
                meta, encoded = kept
                caption = self._caption(meta, key)
                place = (encoded.fps, encoded.start_s, encoded.view)
                return DecodedSample(key, ref, caption, None, None, *place, meta, encoded)
        if self._is_kept:
            made = self._kept(step, ref, key, config, window_u, crop_u)
        else:
            made = self._made(ref, config, window_u, crop_u)
        meta, media = made.meta, made.media
        # By their order: names cost as much as all the rest of making it.
        return DecodedSample(
            key, ref, self._caption(meta, key), media.video, media.audio, media.fps,
            media.start_s, media.view, meta, None, media.planes, media.references,
        )  # fmt: skip

    def _draw(self, key: SampleKey) -> tuple[float, Crop]:
        """What picks the window and the crop; what the recipe does not draw is left as it is."""
        window_u, crop_u = 0.0, CENTRE
        if self._config.window == "random":
            window_u = uniform(sample_generator(self._spec.seed, key, "window"))
        if self._config.crop == "random":
            crop = sample_generator(self._spec.seed, key, "crop")
            crop_u = uniform(crop), uniform(crop)
        return window_u, crop_u

    def _made(
        self, ref: SampleRef, config: DecodeConfig, window_u: float, crop_u: Crop
    ) -> DecodedRecord:
        name, index = ref.dataset, ref.index
        record = self._readers[name].read(index)
        place = ""
        if self.decoders.are_threads:
            place = f"({name}:{index} in {self._datasets[name].shard_of(index).file})"
        media = self.decoders.decode(record, config, window_u, crop_u, place)
        return DecodedRecord(record.meta, media)

    def _kept(
        self,
        step: int,
        ref: SampleRef,
        key: SampleKey,
        config: DecodeConfig,
        window_u: float,
        crop_u: Crop,
    ) -> DecodedRecord:
        """As `_made`, from what is held for later steps or comes from another rank, if it is."""
        found = self._cache.get(key.sample)
        if found is not None and found.media.view == pick_view(
            found.meta, config, window_u, crop_u
        ):
            return found
        dataset = self._datasets[ref.dataset]

        def make() -> DecodedRecord:
            return self._made(ref, config, window_u, crop_u)

        if self._shared is None:
            found = make()
        else:
            place = dataset.content_hash, ref.index, config, window_u, crop_u
            found = self._shared.sample(step, place, make)
        if dataset.is_exact:
            self._cache.put(key.sample, found)
        return found

    def _caption(self, meta: RecordMeta, key: SampleKey) -> str:
        """The one that is drawn for a step; with reference pictures, theirs before it."""
        caption = choose_caption(meta.captions, self._spec.seed, key)
        return with_references(meta.references, caption) if self._config.max_references else caption

    def _from_cache(
        self, ref: SampleRef, config: DecodeConfig, window_u: float, crop_u: Crop
    ) -> tuple[RecordMeta, Encoded] | None:
        """What the view of this step was encoded to; None where another view is in the cache."""
        cache = self._caches.get(ref.dataset)
        kept = cache.read(ref.index) if cache is not None else None
        if kept is None:
            return None
        meta, encoded = kept
        view = pick_view(meta, config, window_u, crop_u)
        if view is None and (config.window, config.crop) == ("first", "centre"):
            return kept
        return kept if view == encoded.view else None


def longest_s(config: DataConfig) -> float:
    """How long one place of a step may take by the limits of a recipe, seconds.

    Storage that does not answer ends the run; decoders that hang end with `max_attempts` of them.
    """
    storage = config.storage
    pauses_s = [storage.wait_s * 2.0**number for number in range(storage.attempts - 1)]
    reading_s = storage.attempts * storage.attempt_limit_s + sum(
        min(pause_s, storage.max_wait_s) for pause_s in pauses_s
    )
    is_remote = any("://" in dataset.path for dataset in config.datasets.values())
    decoding_s = config.quarantine.max_attempts * (config.decode_limit_s + GRACE_S)
    return decoding_s + (reading_s if is_remote else 0.0)


@lru_cache(maxsize=4096)
def sized(config: DecodeConfig, shape: Shape) -> DecodeConfig:
    """The settings for a sample that keeps its own size; a sound has none of its own."""
    num_frames, height, width = shape
    if not num_frames:
        return config
    return replace(config, num_frames=num_frames, height=height, width=width)
