"""A full disk costs a run its samples, and nothing else."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from kinodit.trainer.config import load_config
from kinodit.trainer.gallery import Entry, Gallery
from kinodit.trainer.generate import SampleConfig
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
