"""Read a released model from a local folder in diffusers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from safetensors.torch import load_file
from torch import Tensor

from kinodit.models.config import MMDiTConfig
from kinodit.models.importers import flux, hunyuan_video, sd3
from kinodit.models.importers.convert import WeightsError

FAMILIES: dict[str, ModuleType] = {
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
}
"""diffusers class -> module with `config` and `weights`."""


def load_released(folder: Path) -> tuple[MMDiTConfig, dict[str, Tensor]]:
    """Config and state dict of the transformer in `folder` (config.json and *.safetensors).

    Raises:
        WeightsError: the folder holds no such model, or one of another family.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder} has no config.json: name the folder of the transformer")
    theirs = json.loads(path.read_text())
    family = FAMILIES.get(theirs.get("_class_name", ""))
    if family is None:
        raise WeightsError(
            f"{path} is of class {theirs.get('_class_name')!r}; one of {sorted(FAMILIES)} can be "
            "imported"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} has no *.safetensors files")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    config: MMDiTConfig = family.config(theirs)
    state: dict[str, Tensor] = family.weights(theirs, tensors)
    return config, state
