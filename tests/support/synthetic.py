"""Packs of keyed random tokens with odd lengths, for tests that need no media."""

from __future__ import annotations

import torch

from kinodit.models.init import initialize
from kinodit.models.mmdit import ConditionConfig, MMDiT, MMDiTConfig, StreamConfig
from kinodit.models.random import generator, normal
from kinodit.models.rope import RopeConfig
from kinodit.models.tokens import ModalityTokens, Role, SampleKey, TokenBatch, build_layout

TEXT_CHANNELS, VIDEO_CHANNELS, POOLED = 5, 6, 4


def tiny_model_config(**changes: object) -> MMDiTConfig:
    """Text and video streams, joint and single blocks; every kind of weight, small."""
    fields: dict[str, object] = {
        "streams": {
            "text": StreamConfig(TEXT_CHANNELS, output=False, position="none"),
            "video": StreamConfig(VIDEO_CHANNELS),
        },
        "conditions": {"text_pooled": ConditionConfig(POOLED)},
        "width": 24,
        "num_heads": 2,
        "num_double_blocks": 2,
        "num_single_blocks": 1,
        "rope": RopeConfig(),
        **changes,
    }
    return MMDiTConfig(**fields)  # type: ignore[arg-type]


def uneven_model(**changes: object) -> MMDiT:
    """A tiny model whose every parameter is off its initial value, also where that is zero."""
    model = MMDiT(tiny_model_config(**changes))
    initialize(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            ramp = torch.arange(parameter.numel(), dtype=torch.float32)
            parameter.add_(0.1 * torch.sin(ramp * ramp).view_as(parameter))
    return model


def _tokens(
    latents: list[torch.Tensor], positions: list[torch.Tensor], role: Role, channels: int
) -> ModalityTokens:
    counts = torch.tensor([part.shape[0] for part in latents], dtype=torch.int64)
    segment = torch.repeat_interleave(torch.arange(len(latents)), counts)
    total = int(counts.sum())
    return ModalityTokens(
        latents=torch.cat([*latents, torch.zeros(0, channels)]),
        segment=segment,
        group=torch.zeros(total, dtype=torch.int64),
        position=torch.cat([*positions, torch.zeros(0, 3)]),
        role=torch.full((total,), int(role), dtype=torch.int8),
        level=segment.clone(),
        weight=torch.full((total,), float(role is Role.NOISED)),
    )


def synthetic_pack(step: int, slots: list[int], dtype: torch.dtype = torch.float64) -> TokenBatch:
    """A pack of the given slots of a step; a slot's content depends on step and slot alone."""
    text, video, where, pooled = [], [], [], []
    for slot in slots:
        source = generator("synthetic", step, slot)
        num_text, frames = 1 + slot % 3, 1 + slot % 2
        text.append(normal(source, (num_text, TEXT_CHANNELS)))
        grid = torch.cartesian_prod(
            torch.arange(frames) / 4.0, torch.arange(3.0), torch.arange(1.0 + slot % 4)
        )
        where.append(grid)
        video.append(normal(source, (grid.shape[0], VIDEO_CHANNELS)))
        pooled.append(normal(source, (POOLED,)))
    streams = {
        "text": _tokens(
            text, [torch.zeros(part.shape[0], 3) for part in text], Role.CLEAN, TEXT_CHANNELS
        ),
        "video": _tokens(video, where, Role.NOISED, VIDEO_CHANNELS),
    }
    batch = TokenBatch(
        modalities=streams,
        level_segment=torch.arange(len(slots)),
        level_t=torch.zeros(len(slots)),
        conditions={"text_pooled": torch.stack([*pooled]) if pooled else torch.zeros(0, POOLED)},
        layout=build_layout(list(streams.values())),
        samples=tuple(SampleKey(step, slot, f"synthetic:{slot}") for slot in slots),
    )
    return batch.with_latents({name: tokens.latents.to(dtype) for name, tokens in streams.items()})
