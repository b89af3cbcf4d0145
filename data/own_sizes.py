"""The size that each sample of a dataset keeps, and what it costs, from the index alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinodit.data.config import DataConfig
from kinodit.data.index import FLAG_AUDIO
from kinodit.data.manifest import Dataset
from kinodit.data.shapes import AUDIO, IMAGE, VIDEO, Shape, native_shapes
from kinodit.data.spec import CostModel, PlanError


@dataclass(frozen=True)
class OwnSizes:
    """Sizes of all samples of a dataset, [len] each.

    shapes:   the different ones
    shape_of: row of `shapes` of each sample
    fits:     whether the sample has a size that can be trained on
    tokens:   what it costs at most
    too_long: samples with more frames than the recipe's clips, where that is an error
    """

    name: str
    shapes: tuple[Shape, ...]
    shape_of: NDArray[np.int64]
    fits: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    too_long: NDArray[np.bool_]

    def require_length(self, eligible: NDArray[np.int64]) -> None:
        """Raises PlanError if a sample that takes part is too long and may not be windowed."""
        count = int(self.too_long[eligible].sum())
        if count:
            raise PlanError(
                f"data.datasets.{self.name}: {count} of its {len(eligible)} samples have more than "
                "data.num_frames frames at data.fps, and data.too_long=error: train on windows of "
                "them (data.too_long=window), raise data.num_frames, or leave them out "
                f"(data.datasets.{self.name}.where.duration_s.max)"
            )


def own_sizes(name: str, dataset: Dataset, config: DataConfig, cost: CostModel) -> OwnSizes:
    """The sizes of the samples of dataset `name` under `data.sizes: own`.

    Raises:
        PlanError: the index does not know a sample's size: there is nothing to keep.
    """
    assert cost.grid is not None, "sizes of samples need the codec's grid"
    modality = dataset.column("modality")
    frames, rate, height, width = (
        dataset.column(column).astype(np.int64)
        for column in ("num_frames", "fps_milli", "height", "width")
    )
    unknown = ((modality != AUDIO) & (height * width == 0)) | (
        (modality == VIDEO) & (frames * rate == 0)
    )
    if unknown.any():
        raise PlanError(
            f"data.datasets.{name}: the index does not say how large {int(unknown.sum())} of its "
            f"{len(dataset)} samples are (the first is sample {int(unknown.argmax())}), which "
            "data.sizes=own needs: run `kinodit data index` on it, or use data.sizes=recipe"
        )
    sizes, there = native_shapes(modality, frames, rate, height, width, config, cost.grid)
    shapes, shape_of = np.unique(sizes, axis=0, return_inverse=True)
    shape_of = shape_of.reshape(-1)
    of_picture = np.array(
        [cost.grid.tokens(tuple(shape)) if shape[0] else 0 for shape in shapes.tolist()],
        dtype=np.int64,
    )
    sound = np.where(modality == VIDEO, -(-cost.audio_tokens * sizes[:, 0] // config.num_frames), 0)
    has_audio = (dataset.column("flags") & FLAG_AUDIO).astype(np.bool_)
    sound = np.where(modality == AUDIO, cost.audio_tokens, np.where(has_audio, sound, 0))
    is_long = (modality == VIDEO) & (there > config.num_frames)
    stills_without_codec = (modality == IMAGE) & (cost.image_tokens is None)
    return OwnSizes(
        name=name,
        shapes=tuple((int(t), int(h), int(w)) for t, h, w in shapes.tolist()),
        shape_of=shape_of,
        # Still images that the codec does not take are told by name elsewhere.
        fits=(modality == AUDIO) | (sizes[:, 0] > 0) | stills_without_codec,
        tokens=of_picture[shape_of] + cost.text_tokens + (sound if config.use_audio else 0),
        too_long=is_long & (config.too_long == "error"),
    )
