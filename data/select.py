"""From a recipe's `data` section and datasets on disk to a frozen plan: filters and token costs.

Filters are evaluated once. What they leave is part of the plan's fingerprint, so that a dataset
or a filter that changed between two runs is noticed. An index is gone through a piece at a time,
and of each sample a few bytes are kept: a bit that says whether it takes part and, where samples
differ, its cost and its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinodit.data.chosen import Chosen
from kinodit.data.conditions import Mask, by_meta, by_row, tokens_of, usable
from kinodit.data.config import DataConfig
from kinodit.data.expression import parse
from kinodit.data.filtering import by_expression
from kinodit.data.manifest import Dataset, Piece
from kinodit.data.order import permute
from kinodit.data.own_sizes import own_sizes, require_length, require_sizes
from kinodit.data.record import MODALITIES
from kinodit.data.remote import open_dataset
from kinodit.data.shapes import Shape
from kinodit.data.spec import CostModel, DatasetSpec, PlanError, PlanSpec
from kinodit.data.stream import StreamedDataset


def open_datasets(config: DataConfig) -> dict[str, Dataset]:
    """The recipe's datasets, by name.

    Raises:
        PlanError: the recipe names none, or a stream of what is no archive.
        ManifestError: a folder is not a dataset, or its files are not what its manifest says.
        StorageError: a remote one cannot be read.
    """
    if not config.datasets:
        raise PlanError(
            "data.datasets is empty: name at least one dataset, for example "
            "data.datasets.clips.path=PATH"
        )
    return {
        name: StreamedDataset(name, entry, config.storage)
        if entry.stream.shards
        else open_dataset(entry.path, config.storage)
        for name, entry in config.datasets.items()
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
    entry = config.datasets[name]
    if config.sizes == "own":
        require_sizes(name, dataset)
    rows: dict[Shape, int] = {}
    parts = [_select(name, dataset, piece, config, cost, rows) for piece in dataset.pieces()]
    # Every piece was asked the same, in the same order.
    selection = [
        (of_piece[0][0], sum(left for _, left in of_piece))
        for of_piece in zip(*(part.selection for part in parts), strict=True)
    ]
    chosen = Chosen(np.concatenate([part.mask for part in parts]))
    kept: NDArray[np.int64] | slice = slice(None)
    if entry.max_samples is not None and len(chosen) > entry.max_samples:
        # Of the dataset alone, so that another seed or mixture trains on the same samples.
        drawn = np.arange(entry.max_samples, dtype=np.uint64)
        kept = np.sort(permute(drawn, len(chosen), "cap", dataset.content_hash).astype(np.int64))
        chosen = Chosen.of(chosen[kept])
        selection.append((f"at most {entry.max_samples} samples", len(chosen)))
    _require_a_codec_for_stills(name, _joined(part.is_still for part in parts)[kept], cost)
    require_length(name, _joined(part.too_long for part in parts)[kept])
    tokens = _joined(part.tokens for part in parts)[kept]
    alike = len(tokens) > 0 and tokens.min() == tokens.max()
    shapes: tuple[Shape, ...] = ()
    shape_of: NDArray[np.integer] | None = None
    if config.sizes == "own":
        shapes = tuple(sorted(rows))
        numbers = np.empty(len(rows), dtype=np.min_scalar_type(len(rows)))
        numbers[[rows[shape] for shape in shapes]] = np.arange(len(rows))
        shape_of = numbers[_joined(part.row for part in parts)[kept]]
    return DatasetSpec(
        name=name,
        content_hash=dataset.content_hash,
        num_samples=len(dataset),
        weight=entry.weight if entry.repeat is None else entry.repeat * len(chosen),
        eligible=None if len(chosen) == len(dataset) else chosen,
        tokens=int(tokens[0]) if alike else tokens,
        selection=tuple(selection),
        shapes=shapes,
        shape_of=shape_of,
        chunk=_chunk(dataset, len(chosen), entry.path, config),
        is_exact=dataset.is_exact,
        block_chunks=config.block_shards if _chunk(dataset, 1, entry.path, config) else 0,
    )


@dataclass(frozen=True)
class _Part:
    """What is kept of a piece.

    selection: (condition, samples that were left after it) in the order of evaluation
    mask:      [samples of the piece] who takes part; the rest is of those [n]
    row:       of the table of sizes, where samples keep their own
    """

    selection: tuple[tuple[str, int], ...]
    mask: Mask
    tokens: NDArray[np.integer]
    row: NDArray[np.integer]
    is_still: Mask
    too_long: Mask


def _select(
    name: str,
    dataset: Dataset,
    piece: Piece,
    config: DataConfig,
    cost: CostModel,
    rows: dict[Shape, int],
) -> _Part:
    """The samples of a piece that take part. Adds to `rows`, the table of sizes."""
    entry = config.datasets[name]
    sized = own_sizes(piece, config, cost) if config.sizes == "own" else None
    mask = np.ones(len(piece), dtype=np.bool_)
    selection: list[tuple[str, int]] = []

    def require(text: str, condition: Mask) -> None:
        mask[...] &= condition
        selection.append((text, int(mask.sum())))

    fits = None if sized is None else sized.fits
    for text, condition in (*usable(piece, config, fits), *by_row(piece, entry.where)):
        require(text, condition)
    # Reading records is slow, so only those are read that may still pass.
    for text, condition in by_meta(dataset, piece, entry.where, np.flatnonzero(mask)):
        require(text, condition)
    if entry.filter:
        asked = parse(entry.filter)
        require(entry.filter, by_expression(dataset, piece, asked, np.flatnonzero(mask)))
    is_still = (piece.column("modality") == MODALITIES.index("image"))[mask]
    tokens = tokens_of(piece, config, cost) if sized is None else sized.tokens
    row = _small(np.zeros(len(is_still), np.int64))
    too_long = np.zeros(len(is_still), np.bool_)
    if sized is not None:
        different, inverse = np.unique(sized.shapes, axis=0, return_inverse=True)
        table = [rows.setdefault((t, h, w), len(rows)) for t, h, w in different.tolist()]
        row = _small(np.array(table, dtype=np.int64)[inverse.reshape(-1)[mask]])
        too_long = sized.too_long[mask]
    return _Part(tuple(selection), mask, _small(tokens[mask]), row, is_still, too_long)


def _joined(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(list(parts))


def _small(values: NDArray[np.int64]) -> NDArray[np.integer]:
    """The same numbers in as few bytes as hold them; none is negative."""
    found: NDArray[np.integer] = values.astype(np.min_scalar_type(int(values.max(initial=0))))
    return found


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


def _require_a_codec_for_stills(name: str, is_still: Mask, cost: CostModel) -> None:
    """Dropping what a codec cannot take would train on something else than the recipe says."""
    if cost.image_tokens is None and is_still.any():
        raise PlanError(
            f"data.datasets.{name}: {int(is_still.sum())} of its {len(is_still)} samples are still "
            "images, and modalities.video.codec takes none: leave them out "
            f"(data.datasets.{name}.where.modality=video), or choose a codec with a first frame of "
            "its own (wavelet: first_frame_alone=true, and data.num_frames 1 more)"
        )
