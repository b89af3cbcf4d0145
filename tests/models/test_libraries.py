"""Optional libraries say how to get them, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kinodit.models.errors import MissingExtraError
from kinodit.models.libraries import import_extra

ASKED = """
from kinodit.models.libraries import import_extra, without_warnings
diffusers = import_extra("diffusers", "encoders", "a test")
with without_warnings():
    diffusers.AutoencoderKLWan
"""


def test_a_library_that_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(MissingExtraError, match=r"a test needs no_such_library.*kinodit\[extra\]"):
        import_extra("no_such_library.part", "extra", "a test")


def test_a_library_that_misses_another_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_there.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        import_extra("half_there", "extra", "a test")


@pytest.mark.slow
def test_libraries_say_nothing_of_kernels_for_other_devices() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASKED], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
