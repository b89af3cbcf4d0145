"""Loading an autoencoder class of `diffusers` or `transformers` from a folder; safetensors only."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from kinodit.models.encoders.base import EncoderError
from kinodit.models.libraries import import_extra, without_warnings

Dtype = Literal["float32", "bfloat16", "float16"]


def load_autoencoder(
    folder: Path, class_name: str, dtype: Dtype, library: Literal["diffusers", "transformers"]
) -> Any:
    """The frozen autoencoder `class_name` of `library`, with weights of `dtype`, on the host.

    Raises:
        EncoderError: whatever the library dislikes about the folder.
        MissingExtraError: the library is not installed.
    """
    module = import_extra(library, "encoders", f"a {class_name}")
    if not any(folder.glob("*.safetensors")):
        raise EncoderError(f"{folder} has no *.safetensors; pickled weights are not read")
    settings: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if library == "diffusers":
        settings = {"torch_dtype": getattr(torch, dtype), "low_cpu_mem_usage": False}
    try:
        # Its classes are imported when they are asked for.
        with without_warnings(), warnings.catch_warnings():
            # Oobleck's own layers are built with a function that torch is about to drop.
            warnings.simplefilter("ignore", FutureWarning)
            model, info = getattr(module, class_name).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise EncoderError(
            f"cannot load the {class_name} in {folder}: {' '.join(str(error).split())}"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise EncoderError(
            f"the weights in {folder} lack {len(missing)} tensors of {class_name}, "
            f"for instance {missing[0]!r}"
        )
    return model.eval().requires_grad_(False)
