"""Ranks that share a pack encode a part of it each, and exchange what they made.

Without it, each of the cp x tp ranks that work on a pack encodes all of it. Every sample is encoded
alone, so that who does it changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kinodit.data.decode import DecodedSample
from kinodit.data.encode import SampleEncoder
from kinodit.data.packing import EncodedSample
from kinodit.models.errors import UserError


def encode_together(
    encoder: SampleEncoder, pack: Sequence[DecodedSample], group: ProcessGroup | None
) -> list[EncodedSample]:
    """The samples of a pack as the model's inputs. Collective among the ranks of `group`.

    group: the ranks that have this pack; None: this rank alone

    Raises:
        UserError: what `SampleEncoder.encode` raises, on all ranks if it does on one.
    """
    if group is None or not pack:
        return encoder.encode(pack)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    made: list[EncodedSample] = []
    failure: UserError | None = None
    try:
        own = encoder.encode(pack[rank::size])
        made = [on_device(sample, torch.device("cpu")) for sample in own]
    except UserError as error:
        failure = error
    answers: list[tuple[list[EncodedSample], UserError | None]] = [([], None)] * size
    dist.all_gather_object(answers, (made, failure), group=group)
    for _, refused in answers:
        if refused is not None:
            raise refused
    parts = [iter(part) for part, _ in answers]
    ordered = [next(parts[index % size]) for index in range(len(pack))]
    return [on_device(sample, encoder.device) for sample in ordered]


def on_device(sample: EncodedSample, device: torch.device) -> EncodedSample:
    """The same with its tensors on `device`."""

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    return replace(
        sample,
        latents=moved(dict(sample.latents)),
        text=moved(dict(sample.text)),
        conditions=moved(dict(sample.conditions)),
        references={
            name: [picture.to(device) for picture in pictures]
            for name, pictures in sample.references.items()
        },
    )
