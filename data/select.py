"""From a recipe's `data` section and datasets on disk to a frozen plan: filters and token costs.

Filters are evaluated once. What they leave is part of the plan's fingerprint, so that a dataset
or a filter that changed between two runs is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kinodit.data.config import DataConfig, DecodeConfig, RangeConfig, WhereConfig
from kinodit.data.filtering import by_expression
from kinodit.data.index import FLAG_AUDIO
from kinodit.data.manifest import Dataset
from kinodit.data.order import permute
from kinodit.data.own_sizes import own_sizes
from kinodit.data.reader import ShardReader
from kinodit.data.record import MODALITIES, RecordMeta
from kinodit.data.remote import open_dataset
from kinodit.data.spec import CostModel, DatasetSpec, PlanError, PlanSpec
from kinodit.data.window import FPS_SCALE, num_window_starts

Mask = NDArray[np.bool_]


def open_datasets(config: DataConfig) -> dict[str, Dataset]:
    """The recipe's datasets, by name.

    Raises:
        PlanError: the recipe names none.
        ManifestError: a folder is not a dataset, or its files are not what its manifest says.
        StorageError: a remote one cannot be read.
    """
    if not config.datasets:
        raise PlanError(
            "data.datasets is empty: name at least one dataset, for example "
            "data.datasets.clips.path=PATH"
        )
    return {
        name: open_dataset(entry.path, config.storage) for name, entry in config.datasets.items()
    }


def plan_spec(
    config: DataConfig, datasets: Mapping[str, Dataset], cost: CostModel, seed: int
) -> PlanSpec:
    """The frozen spec of the data order.

    Raises:
        PlanError: a dataset of which no sample can be used, or packs above the token budget.
    """
    return PlanSpec(
        datasets=tuple(
            _dataset_spec(name, datasets[name], config, cost) for name in config.datasets
        ),
        samples_per_step=config.samples_per_step,
        packs_per_step=config.packs_per_step,
        seed=seed,
        token_budget=config.token_budget,
        cost=cost,
        packing=config.packing,
        cost_budget=config.cost_budget,
        window_steps=config.window_steps,
    )


def _dataset_spec(name: str, dataset: Dataset, config: DataConfig, cost: CostModel) -> DatasetSpec:
    where = config.datasets[name].where
    left = np.ones(len(dataset), dtype=np.bool_)
    selection: list[tuple[str, int]] = []
    sized = own_sizes(name, dataset, config, cost) if config.sizes == "own" else None
    usable = _usable(dataset, config, None if sized is None else sized.fits)
    for text, mask in (*usable, *_by_row(dataset, where)):
        left &= mask
        selection.append((text, int(left.sum())))
    # Reading records is slow, so only those are read that may still pass.
    for text, mask in _by_meta(dataset, where, np.flatnonzero(left)):
        left &= mask
        selection.append((text, int(left.sum())))
    entry = config.datasets[name]
    if entry.filter:
        text, mask = by_expression(dataset, entry.filter, np.flatnonzero(left))
        left &= mask
        selection.append((text, int(left.sum())))
    eligible = np.flatnonzero(left)
    if entry.max_samples is not None and len(eligible) > entry.max_samples:
        # Of the dataset alone, so that another seed or mixture trains on the same samples.
        drawn = np.arange(entry.max_samples, dtype=np.uint64)
        kept = permute(drawn, len(eligible), "cap", dataset.content_hash)
        eligible = eligible[np.sort(kept.astype(np.int64))]
        selection.append((f"at most {entry.max_samples} samples", len(eligible)))
    _require_a_codec_for_stills(name, dataset, eligible, cost)
    if sized is not None:
        sized.require_length(eligible)
    tokens = (_tokens(dataset, config, cost) if sized is None else sized.tokens)[eligible]
    alike = len(tokens) > 0 and tokens.min() == tokens.max()
    return DatasetSpec(
        name=name,
        content_hash=dataset.content_hash,
        num_samples=len(dataset),
        weight=entry.weight if entry.repeat is None else entry.repeat * len(eligible),
        eligible=None if len(eligible) == len(dataset) else eligible,
        tokens=int(tokens[0]) if alike else tokens,
        selection=tuple(selection),
        shapes=() if sized is None else sized.shapes,
        shape_of=None if sized is None else sized.shape_of[eligible],
        chunk=_chunk(dataset, len(eligible), entry.path, config),
        block_chunks=config.block_shards if _chunk(dataset, 1, entry.path, config) else 0,
    )


def _chunk(dataset: Dataset, num_eligible: int, path: str, config: DataConfig) -> int:
    """Samples that stay close in an epoch, about a shard; 0 without block shuffle."""
    if config.shuffle == "full" or (config.shuffle == "auto" and "://" not in path):
        return 0
    return max(1, -(-num_eligible // len(dataset.manifest.shards)))


def check_epochs(config: DataConfig, spec: PlanSpec, steps: int) -> None:
    """Raises PlanError if `steps` go through a dataset more often than its `max_epochs`."""
    for name, epochs in spec.epochs(steps).items():
        limit = config.datasets[name].max_epochs
        if limit is not None and epochs > limit:
            raise PlanError(
                f"data.datasets.{name} would be gone through {epochs:.2f} times in {steps} steps, "
                f"and its max_epochs is {limit:g}: lower its weight, or run.steps"
            )


def _require_a_codec_for_stills(
    name: str, dataset: Dataset, eligible: NDArray[np.int64], cost: CostModel
) -> None:
    """Dropping what a codec cannot take would train on something else than the recipe says."""
    stills = dataset.column("modality")[eligible] == MODALITIES.index("image")
    if cost.image_tokens is None and stills.any():
        raise PlanError(
            f"data.datasets.{name}: {int(stills.sum())} of its {len(eligible)} samples are still "
            "images, and modalities.video.codec takes none: leave them out "
            f"(data.datasets.{name}.where.modality=video), or choose a codec with a first frame of "
            "its own (wavelet: first_frame_alone=true, and data.num_frames 1 more)"
        )


def _tokens(dataset: Dataset, config: DataConfig, cost: CostModel) -> NDArray[np.int64]:
    """[len] the tokens of each sample at most."""
    picture = {"video": cost.video_tokens, "image": cost.image_tokens or 0, "audio": 0}
    sound = cost.audio_tokens if config.use_audio else 0
    by_modality = np.array([picture[name] for name in MODALITIES], dtype=np.int64)
    modality = dataset.column("modality")
    has_audio = (dataset.column("flags") & FLAG_AUDIO).astype(np.bool_)
    has_audio |= modality == MODALITIES.index("audio")
    tokens: NDArray[np.int64] = by_modality[modality] + cost.text_tokens
    return tokens + has_audio * sound


def _usable(dataset: Dataset, config: DecodeConfig, fits: Mask | None) -> list[tuple[str, Mask]]:
    """What the recipe needs of a sample, whatever its filters, with the mask [len] of each.

    A zero in the index means "not known": such samples pass, and are checked when decoded. `fits`:
    which samples have a size of their own; None: they take the recipe's.
    """
    conditions: list[tuple[str, Mask]] = []
    modality = dataset.column("modality")
    if not config.use_audio:
        text = "has a picture (data.use_audio is false)"
        conditions.append((text, modality != MODALITIES.index("audio")))
    if not config.use_video:
        has_audio = (dataset.column("flags") & FLAG_AUDIO).astype(np.bool_)
        text = "has sound (data.use_video is false)"
        conditions.append((text, has_audio | (modality == MODALITIES.index("audio"))))
    pixels = dataset.column("height").astype(np.int64) * dataset.column("width")
    small = (pixels <= config.max_pixels) & (
        dataset.column("duration_ms") <= config.max_duration_s * 1000
    )
    within = f"at most {config.max_pixels} pixels and {config.max_duration_s:g} s", small
    if fits is not None:
        return [
            *conditions,
            (f"has a length that the codec takes at {config.fps:g} fps", fits),
            within,
        ]
    frames, fps_milli = dataset.column("num_frames"), dataset.column("fps_milli")
    # Few pairs of length and rate occur, so each is worked out once, exactly.
    pairs = np.stack([frames, fps_milli], axis=1).astype(np.int64)
    different, inverse = np.unique(pairs, axis=0, return_inverse=True)
    fits = np.array(
        [
            0 in (count, rate) or num_window_starts(count, rate, config) > 0
            for count, rate in different.tolist()
        ],
        dtype=np.bool_,
    )
    is_video = modality == MODALITIES.index("video")
    text = f"a video has {config.num_frames} frames at {config.fps:g} fps"
    conditions.append((text, ~is_video | fits[inverse.reshape(-1)]))
    return [*conditions, within]


def _by_row(dataset: Dataset, where: WhereConfig) -> list[tuple[str, Mask]]:
    """Conditions on the index, with the mask [len] of each."""
    conditions: list[tuple[str, Mask]] = []
    if where.modality is not None:
        mask = dataset.column("modality") == MODALITIES.index(where.modality)
        conditions.append((f"modality is {where.modality}", mask))
    if where.has_audio is not None:
        has_audio = (dataset.column("flags") & FLAG_AUDIO).astype(np.bool_)
        text = "has audio" if where.has_audio else "has no audio"
        conditions.append((text, has_audio == where.has_audio))
    ranges = {
        "num_frames": (where.num_frames, dataset.column("num_frames")),
        "duration_s": (where.duration_s, dataset.column("duration_ms") / 1000),
        "fps": (where.fps, dataset.column("fps_milli") / FPS_SCALE),
        "height": (where.height, dataset.column("height")),
        "width": (where.width, dataset.column("width")),
    }
    for name, (bounds, values) in ranges.items():
        if bounds == RangeConfig():
            continue
        low = -np.inf if bounds.min is None else bounds.min
        high = np.inf if bounds.max is None else bounds.max
        conditions.append((_range_text(name, bounds), (values >= low) & (values <= high)))
    return conditions


def _by_meta(
    dataset: Dataset, where: WhereConfig, indices: NDArray[np.int64]
) -> list[tuple[str, Mask]]:
    """Conditions on the records of `indices`, with the mask [len] of each; one pass over them."""
    tests: list[tuple[str, Callable[[RecordMeta], bool]]] = []
    for name, value in where.extra.items():
        tests.append((f"extra.{name} is {value!r}", partial(_has_extra, name, value)))
    for name, bounds in where.scores.items():
        tests.append((_range_text(f"scores.{name}", bounds), partial(_has_score, name, bounds)))
    if not tests:
        return []
    masks = np.zeros((len(tests), len(dataset)), dtype=np.bool_)
    reader = ShardReader(dataset)
    for index in indices.tolist():
        meta = reader.read(index).meta
        masks[:, index] = [test(meta) for _, test in tests]
    reader.close()
    return [(text, mask) for (text, _), mask in zip(tests, masks, strict=True)]


def _has_extra(name: str, value: str, meta: RecordMeta) -> bool:
    return meta.extra.get(name) == value


def _has_score(name: str, bounds: RangeConfig, meta: RecordMeta) -> bool:
    if name not in meta.scores:
        return False
    above = bounds.min is None or meta.scores[name] >= bounds.min
    return above and (bounds.max is None or meta.scores[name] <= bounds.max)


def _range_text(name: str, bounds: RangeConfig) -> str:
    parts = [] if bounds.min is None else [f"{name} >= {bounds.min:g}"]
    if bounds.max is not None:
        parts.append(f"{name} <= {bounds.max:g}")
    return " and ".join(parts) or f"has {name}"
