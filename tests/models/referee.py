"""What the referee tests share: random weights that leave nothing trivially right, and batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kinodit.models.mmdit import MMDiT, MMDiTConfig
from kinodit.models.tokens import (
    ModalityTokens,
    Role,
    SampleKey,
    TokenBatch,
    build_layout,
)


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 0) -> None:
    """Every parameter random: norm weights around 1, all others normal with 1 / sqrt(fan in)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(0.5 * noise + (0.7 if parameter.mean() > 0.5 else 0))
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


def build_ours(config: MMDiTConfig, weights: Mapping[str, Tensor]) -> MMDiT:
    """Our model with imported weights; every name must be there, and no other."""
    model = MMDiT(config)
    model.load_state_dict(weights, strict=True)
    return model


def batch_of(
    latents: Mapping[str, list[Tensor]],
    positions: Mapping[str, list[Tensor]],
    t: Tensor,
    conditions: Mapping[str, Tensor],
) -> TokenBatch:
    """Samples packed one after the other, each with one noise level."""
    modalities = {}
    for name, parts in latents.items():
        segment = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
        modalities[name] = ModalityTokens(
            latents=torch.cat(parts),
            segment=segment,
            group=torch.zeros_like(segment),
            position=torch.cat(positions[name]),
            role=torch.full_like(segment, Role.NOISED, dtype=torch.int8),
            level=segment,
            weight=torch.ones(len(segment)),
        )
    return TokenBatch(
        modalities=modalities,
        level_segment=torch.arange(len(t)),
        level_t=t,
        conditions=conditions,
        layout=build_layout(list(modalities.values())),
        samples=tuple(SampleKey(0, index, str(index)) for index in range(len(t))),
    )


def assert_agrees(ours: Tensor, theirs: Tensor) -> float:
    """Equal to 1e-5 of the largest value, which must itself be of some size; returns the error."""
    size = theirs.abs().max().item()
    assert size > 1e-2
    error = ((ours - theirs).abs().max() / size).item()
    assert error <= 1e-5, error
    return error
