"""Memory of the encoders' weights, from the headers of their files alone."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinodit.models.encoders.audio_vae import AudioVaeConfig
from kinodit.models.encoders.base import EncoderError
from kinodit.models.encoders.folder import weights_folder
from kinodit.models.encoders.text import TransformersTextConfig
from kinodit.models.encoders.video_vae import DiffusersVaeConfig
from kinodit.models.errors import ConfigError
from kinodit.trainer.batches import AUDIO, TEXT, VIDEO
from kinodit.trainer.config import RunConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class FrozenWeights:
    """Bytes of the encoders' weights.

    whole:     that every rank has all the time
    split:     that ranks hold together, each a part
    offloaded: of the largest encoder that is on a device only while it encodes
    gathered:  of a split encoder, what a rank has of others while it encodes, at most
    ranks:     that hold an encoder together; 0: those of a node
    """

    whole: int = 0
    split: int = 0
    offloaded: int = 0
    gathered: int = 0
    ranks: int = 0

    def on_rank(self, num_gpus: int, per_node: int, activations: int) -> int:
        """On the fullest rank, beside the activations of a step.

        All of a step is encoded before its first forward: what encoding alone needs takes the
        place of activations.
        """
        holders = self.ranks or (per_node if per_node > 1 else num_gpus)
        holders = min(holders, num_gpus)
        brought = max(self.offloaded, self.gathered if holders > 1 else 0)
        return self.whole + -(-self.split // holders) + max(0, brought - activations)


def frozen_weights(config: RunConfig, notes: list[str]) -> FrozenWeights:
    """Weights of the encoders in the formats that they are loaded in; `notes` says what is missing.

    Raises:
        ConfigError: a file of weights has no header.
    """
    modalities, streams = config.modalities, config.model.streams
    named: list[tuple[str, object]] = [
        ("text encoder" if name == TEXT else f"text encoder {name}", encoder)
        for name, encoder in modalities.text.all.items()
    ]
    named += [("video codec", modalities.video.codec)] if VIDEO in streams else []
    named += [("audio codec", modalities.audio.codec)] if AUDIO in streams else []
    whole = split = offloaded = gathered = 0
    missing = []
    for name, part in named:
        if not isinstance(part, TransformersTextConfig | DiffusersVaeConfig | AudioVaeConfig):
            continue
        package = getattr(part, "package", None)
        if not is_here(part.path, package):
            missing.append(name)
            continue
        item = ITEM_BYTES[part.dtype]
        sizes = _numbers_in(weights_folder(part.path, package, name))
        total = item * sum(sizes.values())
        if part.offload:
            offloaded = max(offloaded, total)
        elif getattr(part, "shard", False):
            split += total
            # What was gathered, and the buffer that it or the next one arrived in.
            gathered = max(gathered, 2 * item * max(sizes.values(), default=0))
        else:
            whole += total
    if missing:
        notes.append(f"weights of the {' and the '.join(missing)} count as 0 (--encoder-gib)")
    return FrozenWeights(whole, split, offloaded, gathered, modalities.shard_ranks)


def is_here(path: str | None, package: str | None) -> bool:
    """Whether the folder that an encoder names is on this machine."""
    try:
        weights_folder(path, package, "an encoder")
    except EncoderError:
        return False
    return True


def _numbers_in(folder: Path) -> dict[str, int]:
    """Block, or tensor outside of blocks -> numbers in the folder's safetensors, by headers."""
    found: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header: dict[str, Any] = json.loads(stream.read(length))
        except (OSError, ValueError, struct.error) as error:
            raise ConfigError(f"cannot read the header of {file}: {error}") from error
        for name, entry in header.items():
            if name != "__metadata__":
                # "encoder.block.3.layer.0.w" is of block 3.
                found[re.sub(r"(\.\d+)\..*", r"\1", name)] += math.prod(entry["shape"])
    return dict(found)
