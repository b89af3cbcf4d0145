"""What benchmarks/step.py times: a model with its input, and ours on packs of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from kinodit.data.packing import patchify
from kinodit.models.config import ConditionConfig, MMDiTConfig, StreamConfig
from kinodit.models.flops import forward_flops
from kinodit.models.mmdit import MMDiT
from kinodit.models.tokens import ModalityTokens, Role, SampleKey, TokenBatch, build_layout

WIDTH, HEADS, HEAD_DIM, TEXT_TOKENS, TEXT_WIDTH = 512, 8, 64, 128, 512


@dataclass
class Contender:
    """A model and its input: `run()` is one forward pass."""

    name: str
    model: nn.Module
    run: Callable[[], Tensor]
    blocks: list[nn.Module]
    num_tokens: int
    flops: float = 0.0

    def compile(self) -> None:
        """Compile block by block; theirs names which modules repeat, where it does so at all."""
        if isinstance(self.model, ModelMixin) and self.model._repeated_blocks:
            self.model.compile_repeated_blocks()
        else:
            for block in self.blocks:
                block.compile()


Pair = tuple[Contender, Contender]


def depth(num_tokens: int, kinds: int = 1) -> int:
    """Blocks of each of `kinds` kinds: few, since blocks repeat, and fewer where one is costly."""
    return max(1, (2 if num_tokens <= 1024 else 1) // kinds)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Random weights, also where training starts at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if parameter.ndim == 1:
            parameter.copy_(0.1 * noise + (1 if parameter.mean() > 0.5 else 0))
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


def batch_of(
    visual: str,
    samples: list[tuple[Tensor, Tensor, Tensor]],
    names: list[str],
    conditions: Mapping[str, Tensor],
    t: Tensor,
    levels_per_sample: int = 1,
) -> TokenBatch:
    """Packed samples of (visual latents, their positions, text features)."""
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {name: [] for name in names}
    for index, (latents, position, text) in enumerate(samples):
        first = index * levels_per_sample
        level = first + torch.arange(len(latents)) * levels_per_sample // len(latents)
        segment = torch.full((len(latents),), index)
        parts[visual].append((latents, position, segment, level))
        origin = torch.zeros(len(text), 3)
        segment = torch.full((len(text),), index)
        parts["text"].append((text, origin, segment, torch.full_like(segment, first)))
    modalities = {}
    for name, rows in parts.items():
        latents, position, segment, level = (
            torch.cat(column) for column in zip(*rows, strict=True)
        )
        modalities[name] = ModalityTokens(
            latents=latents,
            segment=segment,
            group=torch.zeros_like(segment),
            position=position,
            role=torch.full_like(segment, Role.NOISED, dtype=torch.int8),
            level=level,
            weight=torch.ones(len(segment)),
        )
    return TokenBatch(
        modalities=modalities,
        level_segment=torch.arange(len(samples)).repeat_interleave(levels_per_sample),
        level_t=t,
        conditions=conditions,
        layout=build_layout(list(modalities.values())),
        samples=tuple(SampleKey(0, index, str(index)) for index in range(len(samples))),
    )


def grid(frames: int, rows: int, columns: int) -> Tensor:
    """[N, 3] seconds (6 latent frames each), row, column."""
    axes = torch.arange(frames) / 6, torch.arange(rows), torch.arange(columns)
    return torch.cartesian_prod(*(axis.to(torch.float32) for axis in axes))


def ours(
    name: str, config: MMDiTConfig, weights: Mapping[str, Tensor] | None, batch: TokenBatch
) -> Contender:
    """Our model on `batch`; random weights where none are given."""
    model = MMDiT(config)
    if weights is None:
        randomize(model)
    else:
        model.load_state_dict(weights)
    visual = next(stream for stream in config.streams if config.streams[stream].output)
    model.to(batch.modalities[visual].latents.dtype)
    forward = forward_flops(
        config,
        {stream: tokens.num_tokens for stream, tokens in batch.modalities.items()},
        batch.layout.num_pairs,
        batch.num_segments,
        batch.level_t.numel(),
    )
    return Contender(
        f"ours ({name})",
        model,
        lambda: model(batch)[visual],
        [*model.joint_blocks, *model.single_blocks],
        batch.num_tokens,
        3.0 * forward,
    )


def video_config(num_blocks: int) -> MMDiTConfig:
    """Our text-to-video model of the benchmark's width."""
    return MMDiTConfig(
        streams={
            "text": StreamConfig(TEXT_WIDTH, output=False, position="none"),
            "video": StreamConfig(64),
        },
        conditions={"pooled": ConditionConfig(WIDTH)},
        width=WIDTH,
        num_heads=HEADS,
        num_double_blocks=num_blocks,
    )


def video_batch(clip: Tensor, text: Tensor, t: Tensor) -> TokenBatch:
    """One clip [16, frames, rows, columns] with one noise level, or one per frame."""
    _, frames, rows, columns = clip.shape
    sample = (patchify(clip, (1, 2, 2)), grid(frames, rows // 2, columns // 2), text)
    pooled = torch.randn(1, WIDTH, dtype=clip.dtype)
    return batch_of("video", [sample], ["text", "video"], {"pooled": pooled}, t, t.numel())


def per_frame_pair(dtype: torch.dtype) -> Pair:
    """Ours on 16 frames of 64 tokens: one noise level for all, and one for each frame."""
    config = video_config(2)
    clip = torch.randn(16, 16, 16, 16, dtype=dtype)
    text = torch.randn(TEXT_TOKENS, TEXT_WIDTH, dtype=dtype)
    scalar = ours("one level", config, None, video_batch(clip, text, torch.tensor([0.5])))
    levels = torch.linspace(0.1, 0.9, 16)
    per_frame = ours("per frame", config, None, video_batch(clip, text, levels))
    return scalar, per_frame
