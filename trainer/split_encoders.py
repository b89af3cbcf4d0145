"""Text encoders whose weights the ranks of a group hold together, each a part of every block.

FSDP2 gathers a block when it computes and frees it after. So all ranks of a group compute at the
same time, each a caption of its own: what they ask for is pooled, encoded once, and exchanged. A
caption is encoded alone, by the weights that one process would have: the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from kinodit.data.encode import TEXT, Encoders
from kinodit.models.encoders.base import TextFeatures
from kinodit.models.encoders.text import TransformersTextEncoder
from kinodit.models.errors import ConfigError
from kinodit.trainer.topology import Topology

HOST = torch.device("cpu")


class SplitText:
    """A text encoder that is split over the ranks of a group. Its constructor is collective."""

    def __init__(self, encoder: TransformersTextEncoder, mesh: DeviceMesh) -> None:
        """Split `encoder`, which is whole on the host, over the ranks of `mesh`, of one axis."""

        def apply(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
            for unit in (*blocks, model):
                fully_shard(unit, mesh=mesh, reshard_after_forward=True)

        encoder.split(apply)
        self._encoder = encoder
        self._group: ProcessGroup = mesh.get_group()
        (self.empty,) = encoder.encode([""])
        self.token_dim, self.pooled_dim = encoder.token_dim, encoder.pooled_dim
        self.max_tokens = encoder.max_tokens

    @property
    def fingerprint(self) -> str:
        """That of the whole encoder."""
        return self._encoder.fingerprint

    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        """Features of each caption, on this rank's device. Collective; ranks may ask for none."""
        rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        asked: list[list[str]] = [[]] * size
        dist.all_gather_object(asked, list(captions), group=self._group)
        every = list(dict.fromkeys(caption for part in asked for caption in part))
        made: dict[str, TextFeatures] = {}
        for first in range(0, len(every), size):
            # Who has no caption left computes along with the others: they need its weights.
            own = every[first + rank] if first + rank < len(every) else ""
            (features,) = self._encoder.encode([own])
            made[own] = features.to(HOST)
        if not every:
            return []
        answers: list[dict[str, TextFeatures]] = [{}] * size
        dist.all_gather_object(answers, made, group=self._group)
        found = {caption: one for part in answers for caption, one in part.items()}
        return [found[caption].to(self.empty.tokens.device) for caption in captions]


def split_encoders(
    encoders: Encoders, ranks: int, topology: Topology, device: torch.device
) -> Encoders:
    """The encoders, those split that are to be (`shard: true`). Collective.

    ranks: neighbours that hold an encoder together; 0: those of a node, or all where the launcher
           does not say how many a node has, or where it has one

    Raises:
        ConfigError: the processes do not divide into groups of so many.
        EncoderError: an encoder has no blocks.
    """
    wanted = {
        name: encoder
        for name, encoder in encoders.texts.items()
        if isinstance(encoder, TransformersTextEncoder) and encoder.splits
    }
    world_size, per_node = topology.world_size, topology.ranks_per_node
    if not wanted or world_size == 1:
        return encoders
    size = ranks or (per_node if per_node > 1 else world_size)
    if world_size % size:
        source = f"modalities.shard_ranks={size}" if ranks else f"the {size} ranks of a node"
        raise ConfigError(
            f"{source} do not divide the {world_size} processes that were started, so the text "
            f"encoder {min(wanted)!r} cannot be split alike everywhere: set "
            "modalities.shard_ranks to a divisor, or the encoder's shard=false"
        )
    shape = (world_size // size, size)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("groups", "parts"))["parts"]
    split = {**encoders.texts, **{name: SplitText(one, mesh) for name, one in wanted.items()}}
    text = split.pop(TEXT)
    return replace(encoders, text=text, more=split)
