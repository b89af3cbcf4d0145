"""Filter expressions against a dataset: the index at once, records one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinodit.data.expression import Filter
from kinodit.data.manifest import Dataset, Piece
from kinodit.data.reader import ShardReader
from kinodit.data.record import MODALITIES, RecordMeta
from kinodit.data.row_facts import FLAG_AUDIO
from kinodit.data.window import FPS_SCALE


def by_expression(
    dataset: Dataset, piece: Piece, asked: Filter, candidates: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The mask [len] of the samples of `piece` that pass, of those at `candidates` in it."""
    columns: dict[str, NDArray[Any]] = {}
    for name in asked.fields:
        column = index_column(piece, name)
        if column is not None:
            columns[name] = column[candidates]
    if asked.needs_records:
        columns |= _record_columns(dataset, piece, asked, candidates)
    mask = np.zeros(len(piece), dtype=np.bool_)
    mask[candidates] = asked.mask(columns, len(candidates))
    return mask


def index_column(piece: Piece, name: str) -> NDArray[Any] | None:
    """[len] a field of `expression.INDEX_FIELDS`; None if the index does not have it.

    A size or length of 0 is one that is not known, and missing.
    """

    def number(column: str, scale: float = 1.0) -> NDArray[np.float64]:
        values = piece.column(column) / scale
        return np.where(values == 0, np.nan, values)

    height, width = number("height"), number("width")
    derived = {
        "short_side": np.minimum(height, width),
        "pixels": height * width,
        "aspect": width / height,
        "height": height,
        "width": width,
    }
    if name in derived:
        return derived[name]
    if name == "modality":
        names: NDArray[Any] = np.array(MODALITIES, dtype=object)[piece.column("modality")]
        return names
    if name == "has_audio":
        return (piece.column("flags") & FLAG_AUDIO).astype(np.float64)
    if name == "caption_chars":
        return piece.column("caption_chars").astype(np.float64)
    of_index = {"num_frames": ("num_frames", 1.0), "duration_s": ("duration_ms", 1000.0)}
    of_index["fps"] = ("fps_milli", float(FPS_SCALE))
    return number(*of_index[name]) if name in of_index else None


def _record_columns(
    dataset: Dataset, piece: Piece, asked: Filter, candidates: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """The fields that only records have, of `candidates`; one pass over them."""
    names = [name for name in asked.fields if index_column(piece, name) is None]
    columns: dict[str, NDArray[Any]] = {
        name: np.full(len(candidates), np.nan)
        if name.startswith("scores.")
        else np.full(len(candidates), None, dtype=object)
        for name in names
    }
    reader = ShardReader(dataset)
    for place, index in enumerate(candidates.tolist()):
        meta = reader.read(piece.first + index).meta
        for name in names:
            value = _field(meta, name)
            if value is not None:
                columns[name][place] = value
    reader.close()
    return columns


def _field(meta: RecordMeta, name: str) -> float | str | None:
    section, _, key = name.partition(".")
    if section == "scores":
        return meta.scores.get(key)
    if section == "extra":
        return meta.extra.get(key)
    if name == "lang":
        return meta.captions[0].lang if meta.captions else None
    text: str = getattr(meta, name)
    return text or None
