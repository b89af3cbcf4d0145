"""Samples as files. A full disk costs a run its samples, and nothing else."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from kinodit.data.media import read_mp4
from kinodit.trainer.config import load_config
from kinodit.trainer.gallery import NOT_GIVEN, Entry, Gallery, save_gallery
from kinodit.trainer.generate import Clip, SampleConfig
from kinodit.trainer.setup import Parts
from tests.support.ranks import ROOT


class Refused(Gallery):
    """Writes half of it, and is refused the rest."""

    number = errno.ENOSPC

    def __call__(self, folder: Path, prompts: Sequence[str], settings: SampleConfig) -> list[Entry]:
        folder.mkdir(parents=True)
        (folder / "000.mp4").write_bytes(b"half")
        raise OSError(self.number, os.strerror(self.number))


def gallery(out_dir: Path) -> Refused:
    config = load_config(ROOT / "configs" / "t2v_tiny.yaml", [f"run.out_dir={out_dir}"])
    return Refused(config, cast(Parts, cast(Any, None)), torch.float32)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_no_half_folder_and_no_error(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused = gallery(tmp_path)
    refused.number = number
    assert refused.at_step(7) == []
    assert list((tmp_path / "t2v_tiny" / "samples").iterdir()) == []
    assert "disk full: no samples of step 7" in caplog.text


def test_other_errors_are_errors(tmp_path: Path) -> None:
    refused = gallery(tmp_path)
    refused.number = errno.EACCES
    with pytest.raises(OSError, match="Permission denied"):
        refused.at_step(7)


def test_what_was_given_of_a_clip_is_shown_beside_it(tmp_path: Path) -> None:
    video = torch.full((4, 16, 16, 3), 250, dtype=torch.uint8)
    given = torch.zeros(4, 16, 16, dtype=torch.bool)
    given[:2] = True
    half = (torch.arange(16) < 8).expand(1, 16, 16)
    clips = [
        Clip(0, "a cat", 0, 8.0, video, given=given, task="go_on"),
        Clip(1, "a dog", 0, 8.0, video, given=torch.ones_like(given), task="go_on"),
        Clip(2, "a cow", 0, 8.0, video[:1], given=torch.zeros_like(half)),
        Clip(3, "an owl", 0, 8.0, video[:1], given=half),
    ]
    entries = save_gallery(tmp_path, clips, SampleConfig())
    assert [entry.get("given") for entry in entries] == [
        "000.given.mp4",
        None,
        None,
        "003.given.png",
    ]
    assert [entry.get("task") for entry in entries] == ["go_on", "go_on", None, None]
    frames, fps = read_mp4(tmp_path / "000.given.mp4")
    assert fps == 8.0 and frames.shape == tuple(video.shape)
    assert frames[:2].min() > 240 and abs(int(frames[2:].mean()) - NOT_GIVEN) < 4
    with Image.open(tmp_path / "003.given.png") as picture:
        pixels = np.asarray(picture)
    assert (pixels[:, :8] == 250).all() and (pixels[:, 8:] == NOT_GIVEN).all()
    alone = tmp_path / "alone"
    save_gallery(alone, [dataclasses.replace(clips[0], given=None)], SampleConfig())
    with Image.open(alone / "sheet.png") as one, Image.open(tmp_path / "sheet.png") as four:
        # A row for what was given of the first and the last clip, beside those of the four.
        assert four.height - 16 == 6 * (one.height - 16)
