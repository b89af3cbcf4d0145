"""What a recipe file says, and of its run: without torch, for the scripts around a run.

`trainer/config.py` composes and checks everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kinodit.models.errors import ConfigError


@dataclass(frozen=True)
class RunSection:
    """The run as a whole.

    name, out_dir:    the run's folder is OUT_DIR/NAME
    seed:             of weights, data order and every draw
    steps:            optimizer steps
    stop_after_steps: save and end after so many steps of this start; 0: go on to the end
    deadline_s:       seconds a collective may wait before the run is given up
    require_certificate: refuse to start in a layout that `kinodit certify` was not run for
    """

    name: str = "run"
    out_dir: str = "runs"
    seed: int = 0
    steps: int = 1000
    stop_after_steps: int = 0
    deadline_s: float = 1800.0
    require_certificate: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"run.steps={self.steps}: must be at least 1")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"run.name={self.name!r}: must be a plain folder name")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out_dir) / self.name


def read_recipe(path: Path, overrides: Sequence[str]) -> DictConfig:
    """The recipe at `path` with `overrides` ("key=value" each): what they say, unchecked.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or holds interpolations.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read recipe {path}: {getattr(error, 'strerror', '') or error}"
        ) from error
    try:
        recipe = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path} holds a {type(recipe).__name__}; a recipe is a mapping")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        raw = OmegaConf.merge(OmegaConf.create(recipe), OmegaConf.from_dotlist(list(overrides)))
        assert isinstance(raw, DictConfig)
        _refuse_interpolation(raw)
        return raw
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def load_run_section(path: Path, overrides: Sequence[str] = ()) -> RunSection:
    """The recipe's `run` section; nothing else of it is checked.

    Raises:
        ConfigError: as `read_recipe`, or a key or a value of the section does not fit.
    """
    raw = read_recipe(path, overrides)
    try:
        section = OmegaConf.merge(OmegaConf.structured(RunSection), raw.get("run") or {})
        return cast(RunSection, OmegaConf.to_object(section))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: run: {explain(error)}") from error


def _refuse_interpolation(raw: DictConfig) -> None:
    """A recipe says what it means: resolved, `${oc.env:TOKEN}` would be saved in clear."""
    pending: list[tuple[str, Any]] = [("", OmegaConf.to_container(raw, resolve=False))]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{key}.{name}".lstrip("."), item) for name, item in value.items()]
        elif isinstance(value, list):
            pending += [(f"{key}[{index}]", item) for index, item in enumerate(value)]
        elif isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{key}={value!r}: recipes are not interpolated; write the value, or pass it as "
                f"the override {key}=... from the shell"
            )


def explain(error: OmegaConfBaseException) -> str:
    """OmegaConf's sentence and the full key, on one line."""
    lines = str(error).splitlines()
    key = next((line.split(":", 1)[1].strip() for line in lines if "full_key" in line), "")
    return f"{key}: {lines[0]}" if key else lines[0]
