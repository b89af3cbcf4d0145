"""Who may enter a run's folder."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from kinodit.models.errors import ConfigError
from kinodit.trainer.config import RunConfig, load_config
from kinodit.trainer.entry import lock_folder
from kinodit.trainer.topology import Topology
from tests.support.ranks import ROOT


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(ROOT / "configs" / "t2v_tiny.yaml", [f"run.out_dir={tmp_path / 'runs'}"])


def test_a_new_folder_is_nobody_elses_to_change(config: RunConfig) -> None:
    with ExitStack() as stack:
        lock_folder(config, Topology(0, 1, 0), stack)
        assert config.run.folder.stat().st_mode & 0o027 == 0


def test_another_users_folder_is_refused(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.run.folder.mkdir(parents=True)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with ExitStack() as stack, pytest.raises(ConfigError) as error:
        lock_folder(config, Topology(0, 1, 0), stack)
    assert f"belongs to user {owner}, and this is user {owner + 1}" in str(error.value)
    assert list(config.run.folder.iterdir()) == []
