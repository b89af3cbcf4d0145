"""Random packs for model tests: samples of any sizes, packed together or one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinodit.models.tokens import (
    ModalityTokens,
    Role,
    SampleKey,
    TokenBatch,
    Visibility,
    build_layout,
    see_all,
)


@dataclass(frozen=True)
class Sample:
    """One segment: per modality latents [n, C], positions, groups and local level rows."""

    latents: Mapping[str, Tensor]
    position: Mapping[str, Tensor]
    group: Mapping[str, Tensor]
    level: Mapping[str, Tensor]
    level_t: Tensor
    conditions: Mapping[str, Tensor]


def grid_positions(frames: int, rows: int, columns: int, fps: float = 4.0) -> Tensor:
    """[frames * rows * columns, 3] seconds, row, column."""
    axes = (torch.arange(frames) / fps, torch.arange(rows), torch.arange(columns))
    grid = torch.meshgrid(*(axis.float() for axis in axes), indexing="ij")
    return torch.stack([axis.reshape(-1) for axis in grid], dim=-1)


def random_sample(
    generator: torch.Generator,
    grids: Mapping[str, tuple[int, int, int]],
    channels: Mapping[str, int],
    conditions: Mapping[str, int],
    per_frame: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Sample:
    """A sample whose modalities have the given (frames, rows, columns) grids.

    `per_frame` gives every frame of every modality its own noise level and attention group.
    """
    latents, position, group, level = {}, {}, {}, {}
    num_levels = max([1, *(frames for frames, _, _ in grids.values())]) if per_frame else 1
    for name, (frames, rows, columns) in grids.items():
        count = frames * rows * columns
        latents[name] = torch.randn(count, channels[name], generator=generator, dtype=dtype)
        position[name] = grid_positions(frames, rows, columns)
        frame = torch.arange(frames).repeat_interleave(rows * columns)
        group[name] = frame if per_frame else torch.zeros(count, dtype=torch.int64)
        level[name] = frame if per_frame else torch.zeros(count, dtype=torch.int64)
    return Sample(
        latents=latents,
        position=position,
        group=group,
        level=level,
        level_t=torch.rand(num_levels, generator=generator),
        conditions={
            name: torch.randn(dim, generator=generator, dtype=dtype)
            for name, dim in conditions.items()
        },
    )


def pack(samples: Sequence[Sample], visible: Visibility = see_all) -> TokenBatch:
    """All samples in one batch."""
    first_level = [0]
    for sample in samples:
        first_level.append(first_level[-1] + sample.level_t.numel())
    modalities = {}
    for name in samples[0].latents:
        latents = torch.cat([sample.latents[name] for sample in samples])
        count = latents.shape[0]
        modalities[name] = ModalityTokens(
            latents=latents,
            segment=torch.cat(
                [
                    torch.full((sample.latents[name].shape[0],), index)
                    for index, sample in enumerate(samples)
                ]
            ),
            group=torch.cat([sample.group[name] for sample in samples]),
            position=torch.cat([sample.position[name] for sample in samples]),
            role=torch.full((count,), Role.NOISED, dtype=torch.int8),
            level=torch.cat(
                [
                    sample.level[name] + offset
                    for sample, offset in zip(samples, first_level, strict=False)
                ]
            ),
            weight=torch.ones(count),
        )
    return TokenBatch(
        modalities=modalities,
        level_segment=torch.cat(
            [torch.full((sample.level_t.numel(),), index) for index, sample in enumerate(samples)]
        ),
        level_t=torch.cat([sample.level_t for sample in samples]),
        conditions={
            name: torch.stack([sample.conditions[name] for sample in samples])
            for name in samples[0].conditions
        },
        layout=build_layout(list(modalities.values()), visible),
        samples=tuple(SampleKey(0, index, f"test:{index}") for index in range(len(samples))),
    )


def filler(channels: Mapping[str, int], conditions: Mapping[str, int]) -> TokenBatch:
    """A pack of no segments and no tokens."""
    modalities = {
        name: ModalityTokens(
            latents=torch.zeros(0, size),
            segment=torch.zeros(0, dtype=torch.int64),
            group=torch.zeros(0, dtype=torch.int64),
            position=torch.zeros(0, 3),
            role=torch.zeros(0, dtype=torch.int8),
            level=torch.zeros(0, dtype=torch.int64),
            weight=torch.zeros(0),
        )
        for name, size in channels.items()
    }
    return TokenBatch(
        modalities=modalities,
        level_segment=torch.zeros(0, dtype=torch.int64),
        level_t=torch.zeros(0),
        conditions={name: torch.zeros(0, dim) for name, dim in conditions.items()},
        layout=build_layout(list(modalities.values())),
        samples=(),
    )


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Make every parameter random, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(noise * scale)
