"""The size that each sample keeps, and what it costs, from the index alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinodit.data.config import DataConfig
from kinodit.data.manifest import Dataset, Piece
from kinodit.data.row_facts import FLAG_AUDIO
from kinodit.data.shapes import AUDIO, IMAGE, VIDEO, native_shapes
from kinodit.data.spec import CostModel, PlanError


@dataclass(frozen=True)
class OwnSizes:
    """Sizes of a run of samples.

    shapes:   [n, 3] frames, rows and columns of each
    fits:     [n] whether the sample has a size that can be trained on
    tokens:   [n] what it costs at most
    too_long: [n] more frames than the recipe's clips, where that is an error
    """

    shapes: NDArray[np.int64]
    fits: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    too_long: NDArray[np.bool_]


def require_length(name: str, too_long: NDArray[np.bool_]) -> None:
    """Raises PlanError if a sample that takes part is too long and may not be windowed."""
    count = int(too_long.sum())
    if count:
        raise PlanError(
            f"data.datasets.{name}: {count} of its {len(too_long)} samples have more than "
            "data.num_frames frames at data.fps, and data.too_long=error: train on windows of "
            "them (data.too_long=window), raise data.num_frames, or leave them out "
            f"(data.datasets.{name}.where.duration_s.max)"
        )


def require_sizes(name: str, dataset: Dataset) -> None:
    """Raises PlanError if the index does not know a sample's size: there is nothing to keep."""
    count, first = 0, -1
    for piece in dataset.pieces():
        modality = piece.column("modality")
        frames, rate, height, width = _geometry(piece)
        unknown = ((modality != AUDIO) & (height * width == 0)) | (
            (modality == VIDEO) & (frames * rate == 0)
        )
        if unknown.any() and first < 0:
            first = piece.first + int(unknown.argmax())
        count += int(unknown.sum())
    if count:
        raise PlanError(
            f"data.datasets.{name}: the index does not say how large {count} of its "
            f"{len(dataset)} samples are (the first is sample {first}), which "
            "data.sizes=own needs: run `kinodit data index` on it, or use data.sizes=recipe"
        )


def own_sizes(piece: Piece, config: DataConfig, cost: CostModel) -> OwnSizes:
    """The sizes under `data.sizes: own` of samples of which the index knows them."""
    assert cost.grid is not None, "sizes of samples need the codec's grid"
    modality = piece.column("modality")
    frames, rate, height, width = _geometry(piece)
    sizes, there = native_shapes(modality, frames, rate, height, width, config, cost.grid)
    different, row = np.unique(sizes, axis=0, return_inverse=True)
    of_picture = np.array(
        [cost.grid.tokens(tuple(shape)) if shape[0] else 0 for shape in different.tolist()],
        dtype=np.int64,
    )
    sound = np.where(modality == VIDEO, -(-cost.audio_tokens * sizes[:, 0] // config.num_frames), 0)
    has_audio = (piece.column("flags") & FLAG_AUDIO).astype(np.bool_)
    sound = np.where(modality == AUDIO, cost.audio_tokens, np.where(has_audio, sound, 0))
    is_long = (modality == VIDEO) & (there > config.num_frames)
    stills_without_codec = (modality == IMAGE) & (cost.image_tokens is None)
    return OwnSizes(
        shapes=sizes,
        # Still images that the codec does not take are told by name elsewhere.
        fits=(modality == AUDIO) | (sizes[:, 0] > 0) | stills_without_codec,
        tokens=of_picture[row.reshape(-1)] + cost.text_tokens + (sound if config.use_audio else 0),
        too_long=is_long & (config.too_long == "error"),
    )


def _geometry(piece: Piece) -> tuple[NDArray[np.int64], ...]:
    names = ("num_frames", "fps_milli", "height", "width")
    return tuple(piece.column(name).astype(np.int64) for name in names)
