"""Latent cells and the pixels that they hold."""

from __future__ import annotations

import pytest
import torch

from kinodit.data.region import pixels_of
from kinodit.models.encoders.wavelet import WaveletConfig

CELLS = torch.tensor([[[True, False]], [[False, True]]])


def test_cells_grow_to_the_pixels_that_they_hold() -> None:
    every = pixels_of(CELLS, (4, 2, 4), 2)
    assert every.shape == (4, 2, 4)
    assert every[:2, :, :2].all() and every[2:, :, 2:].all() and int(every.sum()) == 16
    # A codec with a first frame of its own: one frame, then the others of a stride of 4.
    alone = pixels_of(CELLS, (5, 2, 4), 4)
    assert alone[:1, :, :2].all() and alone[1:, :, 2:].all() and int(alone.sum()) == 20
    still = pixels_of(CELLS[:1], (1, 2, 4), 4)
    assert still[:, :, :2].all() and int(still.sum()) == 4


@pytest.mark.parametrize(("levels", "alone", "num_frames"), [(2, True, 9), (2, False, 12)])
def test_they_are_those_that_the_codec_decodes_a_cell_to(
    levels: int, alone: bool, num_frames: int
) -> None:
    """Nine frames are three cells of a stride of four, as of three frames each they would be."""
    config = WaveletConfig(temporal_levels=levels, spatial_levels=1, first_frame_alone=alone)
    codec = config.build(torch.device("cpu"))
    dark = codec.encode(torch.zeros(num_frames, 4, 4, 3, dtype=torch.uint8))
    light = codec.encode(torch.full((num_frames, 4, 4, 3), 255, dtype=torch.uint8))
    for cell in range(dark.shape[1]):
        given = torch.zeros(dark.shape[1:], dtype=torch.bool)
        given[cell] = True
        shown = codec.decode(torch.where(given, light, dark)) > 127
        expected = pixels_of(given, (num_frames, 4, 4), codec.stride[0])
        assert torch.equal(shown.all(-1), expected), cell
