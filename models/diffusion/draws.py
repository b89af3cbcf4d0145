"""The keyed draws of an objective: a noise level for each row, noise for each sample.

Shape legend: N tokens of one modality, C channels, K rows of the table of levels, S segments.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kinodit.models.diffusion.timesteps import LevelLaw
from kinodit.models.random import normal, sample_generator, uniform
from kinodit.models.tokens import ModalityTokens, Role, SampleKey, TokenBatch


def noised_rows(batch: TokenBatch) -> Tensor:
    """Which rows of the table of levels have noised tokens, [K] bool, on the batch's device."""
    count_K = torch.zeros_like(batch.level_segment)
    for tokens in batch.modalities.values():
        count_K.index_add_(0, tokens.level, (tokens.role == Role.NOISED).to(count_K.dtype))
    return count_K > 0


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The dtype that the tensors promote to, and no less than float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def drawn_levels(batch: TokenBatch, rows_K: Tensor, law: LevelLaw, seed: int) -> Tensor:
    """Levels [K]: each row's own draw. Rounded to float32 whatever the precision of the batch."""
    num_tokens = [0] * batch.num_segments
    for tokens in batch.modalities.values():
        owners = tokens.segment[tokens.role == Role.NOISED].cpu()
        for segment, count in enumerate(
            torch.bincount(owners, minlength=batch.num_segments).tolist()
        ):
            num_tokens[segment] += count
    owner_K: list[int] = batch.level_segment.tolist()
    drawn_K: list[bool] = rows_K.tolist()
    num_drawn = [0] * batch.num_segments
    for owner, drawn in zip(owner_K, drawn_K, strict=True):
        num_drawn[owner] += drawn
    place = [0] * batch.num_segments
    u_K = torch.zeros(len(owner_K), dtype=torch.float64)
    for row, (owner, drawn) in enumerate(zip(owner_K, drawn_K, strict=True)):
        if drawn:
            purpose = "timestep" if num_drawn[owner] == 1 else f"timestep/{place[owner]}"
            u_K[row] = uniform(sample_generator(seed, batch.samples[owner], purpose))
        place[owner] += 1
    t_K = law.levels(u_K, [num_tokens[owner] for owner in owner_K]).to(torch.float32)
    return t_K.to(batch.level_t)


def drawn_noise(
    tokens: ModalityTokens,
    samples: tuple[SampleKey, ...],
    seed: int,
    purpose: str,
    same_at_all_steps: bool,
) -> Tensor:
    """Noise [N, C], at least float32, for all tokens of the samples that have noised ones."""
    segment_N = tokens.segment.cpu()
    owners = segment_N[tokens.role.cpu() == Role.NOISED]
    sizes = torch.bincount(segment_N, minlength=len(samples)).tolist()
    num_noised = torch.bincount(owners, minlength=len(samples)).tolist()
    noise_NC = torch.zeros(tokens.latents.shape, dtype=torch.float32)
    start = 0
    for key, size, noised in zip(samples, sizes, num_noised, strict=True):
        if noised:
            named = replace(key, step=0) if same_at_all_steps else key
            source = sample_generator(seed, named, purpose)
            noise_NC[start : start + size] = normal(source, (size, noise_NC.shape[1]))
        start += size
    return noise_NC.to(tokens.latents.device, at_least_float32(tokens.latents))
