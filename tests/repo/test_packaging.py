"""A wheel and an sdist, installed into empty environments, work outside the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.repo.test_layout import PACKAGES, ROOT
from tests.support.quick import quick

SOURCES = (*PACKAGES, "configs", "slurm", "src")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel made from it; built in a copy, not in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=copy)
    return copy / "dist"


def install(distribution: Path, folder: Path) -> Path:
    """An empty environment with `distribution`; what it depends on is borrowed from this one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder))
    borrowed = Path(str(site).strip()) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(*pip, "install", *options, distribution, cwd=folder)
    return folder / "bin"


@pytest.mark.parametrize("kind", quick(["*.whl", "*.tar.gz"], "*.whl"))
def test_installs_into_an_empty_environment(kind: str, dist: Path, tmp_path: Path) -> None:
    (distribution,) = dist.glob(kind)
    programs = install(distribution, tmp_path / "environment")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    assert "COMMAND" in run(programs / "kinodit", "--help", cwd=outside)
    assert run(programs / "kinodit", "--version", cwd=outside).startswith("kinodit ")
    found = run(
        programs / "python",
        "-c",
        "import kinodit, importlib.resources as r; print(kinodit.__file__);"
        "print((r.files('kinodit') / 'slurm/templates/train.sbatch.j2').is_file())",
        cwd=outside,
    ).split()
    assert Path(found[0]).is_relative_to(tmp_path / "environment")
    assert found[1] == "True"


def test_the_wheel_holds_one_top_level_name_and_every_file(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"kinodit"}
    wanted = {
        f"kinodit/{path.relative_to(ROOT).as_posix()}"
        for name in SOURCES[:-1]
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert wanted <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_files_not_links(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
