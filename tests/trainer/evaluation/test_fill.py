"""What is filled in is compared with a copy of what was given, and what was given with itself."""

from __future__ import annotations

import pytest
import torch

from kinodit.models.random import generator
from kinodit.trainer.evaluation.fill import compare_fill, copied, fill_figures


def noise(*key: str, frames: int = 5) -> torch.Tensor:
    drawn = generator("fill", *key).integers(0, 256, (frames, 4, 6, 3))
    return torch.from_numpy(drawn).to(torch.uint8)


def of_frames(*given: int, frames: int = 5) -> torch.Tensor:
    mask = torch.zeros(frames, 4, 6, dtype=torch.bool)
    mask[list(given)] = True
    return mask


def test_a_copy_is_the_nearest_frame_that_is_given() -> None:
    video = noise("copy")
    copy = copied(video, of_frames(0, 3)) * 255
    assert torch.equal(copy.round().to(torch.uint8), video[[0, 0, 3, 3, 3]])
    # Of two as near, the one before.
    assert torch.equal((copied(video, of_frames(0, 4)) * 255).round()[2], video[0].double())


def test_a_hole_is_filled_with_the_mean_of_its_frame() -> None:
    video = noise("hole")
    given = torch.ones(5, 4, 6, dtype=torch.bool)
    given[:, 1:3, 2:4] = False
    copy = copied(video, given)
    assert torch.equal((copy * 255).round()[given], video[given].double())
    means = torch.stack(
        [frame[known].double().mean(0) for frame, known in zip(video, given, strict=True)]
    )
    assert torch.allclose(copy[:, 1, 2] * 255, means) and torch.allclose(copy[:, 2, 3] * 255, means)


def test_errors_are_of_what_was_filled_and_of_what_was_kept() -> None:
    real, given = noise("real"), of_frames(0)
    copy = (copied(real, given) * 255).round().to(torch.uint8)
    as_good = fill_figures([compare_fill(copy, real, real, given)])
    assert as_good["fill_error"] == pytest.approx(as_good["copy_error"])
    assert as_good["nearer_than_copy"] == 0 and as_good["kept_error"] == 0
    perfect = fill_figures([compare_fill(real, real, real, given)])
    assert perfect["fill_error"] == 0 < perfect["copy_error"] and perfect["nearer_than_copy"] == 1
    changed = real.clone()
    changed[0] = real[0] ^ 1
    off = fill_figures([compare_fill(changed, real, changed, given)])
    assert off["fill_error"] == 0
    assert off["kept_error"] == pytest.approx(1 / 255) == off["codec_error"]
    assert fill_figures([]) == {}


def test_errors_are_pooled_over_values_and_not_over_clips() -> None:
    real = noise("pooled")
    wrong = real.clone()
    wrong[4] = 255 - real[4]
    one, all_but_one = of_frames(0, 1, 2, 3), of_frames(0)
    clips = [compare_fill(wrong, real, real, given) for given in (one, all_but_one)]
    squares = 2 * ((255 - 2 * real[4].double()) / 255).square().sum()
    expected = float((squares / (3 * 24 * 5)).sqrt())
    assert fill_figures(clips)["fill_error"] == pytest.approx(expected)
