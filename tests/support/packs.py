"""Packs of plain tokens, spelled out sample by sample, for tests of the objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kinodit.models.random import generator, normal
from kinodit.models.tokens import ModalityTokens, Role, SampleKey, TokenBatch, build_layout


@dataclass(frozen=True)
class Part:
    """Tokens of one modality of one sample.

    roles:  one per token
    levels: for each token, which of the sample's rows of levels it has; None: all the first
    std:    of the latents
    """

    roles: Sequence[Role]
    levels: Sequence[int] | None = None
    std: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One sample: its parts by modality, and the levels that its rows start with."""

    name: str
    parts: dict[str, Part]
    level_t: Sequence[float] = field(default=(0.0,))


def noised(count: int) -> Part:
    return Part([Role.NOISED] * count)


def clean(count: int) -> Part:
    return Part([Role.CLEAN] * count)


def build_pack(
    samples: Sequence[Sample],
    channels: dict[str, int],
    step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TokenBatch:
    """A pack of the samples in order; a sample's latents depend on its name alone."""
    first_row = [0]
    for sample in samples:
        first_row.append(first_row[-1] + len(sample.level_t))
    modalities = {}
    for name, width in channels.items():
        counts = [len(s.parts[name].roles) if name in s.parts else 0 for s in samples]
        latents = [torch.zeros(0, width)]
        roles: list[int] = []
        levels: list[int] = []
        for index, sample in enumerate(samples):
            part = sample.parts.get(name, Part([]))
            source = generator("pack", sample.name, name)
            latents.append(part.std * normal(source, (len(part.roles), width)))
            roles += [int(role) for role in part.roles]
            inner = part.levels if part.levels is not None else [0] * len(part.roles)
            levels += [first_row[index] + level for level in inner]
        total = sum(counts)
        modalities[name] = ModalityTokens(
            latents=torch.cat(latents).to(dtype),
            segment=_repeated(counts),
            group=torch.zeros(total, dtype=torch.int64),
            position=torch.zeros(total, 3),
            role=torch.tensor(roles, dtype=torch.int8),
            level=torch.tensor(levels, dtype=torch.int64),
            weight=torch.tensor(roles, dtype=torch.float32),
        )
    return TokenBatch(
        modalities=modalities,
        level_segment=_repeated([len(sample.level_t) for sample in samples]),
        level_t=torch.tensor([t for s in samples for t in s.level_t]),
        conditions={},
        layout=build_layout(list(modalities.values())),
        samples=tuple(SampleKey(step, slot, s.name) for slot, s in enumerate(samples)),
    )


def _repeated(counts: Sequence[int]) -> torch.Tensor:
    """Index i, `counts[i]` times."""
    repeats = torch.tensor(counts, dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(counts)), repeats)
