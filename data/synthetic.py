"""Packs of keyed random tokens with odd lengths: for proofs that must not open anyone's data.

Shape legend: N tokens of one modality, C its channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinodit.data.packing import EncodedSample, PackSpec, StreamSpec, pack
from kinodit.data.tasks import DrawnTask, TaskConfig
from kinodit.models.random import generator, normal
from kinodit.models.tokens import ModalityTokens, Role, SampleKey, TokenBatch, build_layout

SECONDS_PER_FRAME = 0.25
SLOTS_PER_STEP = 8
"""After so many slots, tasks go on with the next step."""


@dataclass(frozen=True)
class SyntheticStream:
    """channels: C; is_noised: whether its tokens have a loss, or are conditions like a caption."""

    channels: int
    is_noised: bool


def synthetic_pack(
    step: int,
    slots: Sequence[int],
    streams: Mapping[str, SyntheticStream],
    conditions: Mapping[str, int],
    dtype: torch.dtype,
) -> TokenBatch:
    """A pack of the given slots of a step; what a slot holds depends on step and slot alone.

    Lengths are odd, differ from slot to slot and are 1 at times, as are numbers of frames; every
    third slot lacks the last noised stream if there are several (an image beside clips with sound).
    `conditions` are the dims of condition vectors. Latents are of `dtype`, without slots there
    are no tokens (a filler pack).
    """
    parts: dict[str, list[ModalityTokens]] = {name: [] for name in streams}
    noised = [name for name, stream in streams.items() if stream.is_noised]
    for segment, slot in enumerate(slots):
        for name, stream in streams.items():
            source = generator("synthetic", step, slot, name)
            is_absent = len(noised) > 1 and name == noised[-1] and slot % 3 == 2
            grid = _grid(slot, stream.is_noised, 0 if is_absent else 1)
            latents = normal(source, (len(grid), stream.channels)).to(dtype)
            parts[name].append(_tokens(latents, grid, segment, stream.is_noised))
    modalities = {
        name: _joined(parts[name], stream.channels, dtype) for name, stream in streams.items()
    }
    vectors = {
        name: torch.stack([_vector(step, slot, name, dim) for slot in slots] or [torch.zeros(dim)])
        for name, dim in conditions.items()
    }
    return TokenBatch(
        modalities=modalities,
        level_segment=torch.arange(len(slots)),
        level_t=torch.zeros(len(slots)),
        conditions={name: vector[: len(slots)].to(dtype) for name, vector in vectors.items()},
        layout=build_layout(list(modalities.values())),
        samples=tuple(SampleKey(step, slot, f"synthetic:{slot}") for slot in slots),
    )


def task_pack(
    step: int,
    slots: Sequence[int],
    streams: Mapping[str, SyntheticStream],
    conditions: Mapping[str, int],
    dtype: torch.dtype,
    tasks: Mapping[str, TaskConfig],
    seed: int,
) -> TokenBatch:
    """The same with tasks: slot after slot has the next of `tasks`, and what it leaves open drawn.

    Samples have two frames or more, and streams after the first noised one twice as many a second,
    one token each, as sound has. Every third slot lacks the last of them, if its task lets it.
    """
    spec = PackSpec(
        tuple(
            StreamSpec(name, stream.channels, (1, 1, 1) if stream.is_noised else None)
            for name, stream in streams.items()
        ),
        conditions,
    )
    samples = [_sample(step, slot, streams, conditions, dtype, tasks, seed) for slot in slots]
    batch = pack(samples, spec)
    return batch.with_latents({n: t.latents.to(dtype) for n, t in batch.modalities.items()})


def _sample(
    step: int,
    slot: int,
    streams: Mapping[str, SyntheticStream],
    conditions: Mapping[str, int],
    dtype: torch.dtype,
    tasks: Mapping[str, TaskConfig],
    seed: int,
) -> EncodedSample:
    noised = [name for name, stream in streams.items() if stream.is_noised]
    name = list(tasks)[(step * SLOTS_PER_STEP + slot) % len(tasks)]
    wanting = tasks[name].wanting
    if slot % 3 == 2 and tasks[name].fits(noised[:-1], wanting):
        noised = noised[:-1]
    latents, seconds, references = {}, {}, {}
    frames = 2 + slot % 3
    for index, stream in enumerate(noised):
        grid = (2 * frames - 1, 1, 1) if index else (frames, 3, 1 + slot % 4)
        source = generator("synthetic", step, slot, stream)
        latents[stream] = normal(source, (streams[stream].channels, *grid)).to(dtype)
        seconds[stream] = SECONDS_PER_FRAME / (2 if index else 1)
        if stream in wanting:
            references[stream] = [
                normal(source, (streams[stream].channels, 1, 1 + slot % 2, 1 + number)).to(dtype)
                for number in range(1 + slot % 3)
            ]
    return EncodedSample(
        key=SampleKey(step, slot, f"synthetic:{slot}"),
        latents=latents,
        seconds=seconds,
        text={
            stream: normal(
                generator("synthetic", step, slot, stream), (1 + slot * 2 % 7, facts.channels)
            ).to(dtype)
            for stream, facts in streams.items()
            if not facts.is_noised
        },
        conditions={c: _vector(step, slot, c, dim).to(dtype) for c, dim in conditions.items()},
        task=DrawnTask(name, tasks[name], seed),
        references=references,
    )


def _vector(step: int, slot: int, name: str, dim: int) -> Tensor:
    return normal(generator("synthetic", step, slot, name), (dim,))


def _grid(slot: int, is_noised: bool, factor: int) -> Tensor:
    """[N, 3] positions: a grid of frames, rows and columns, or as many words at the origin."""
    if not is_noised:
        return torch.zeros(1 + slot * 2 % 7, 3)
    frames = torch.arange(factor * (1 + slot % 3)) * SECONDS_PER_FRAME
    return torch.cartesian_prod(frames, torch.arange(3.0), torch.arange(1.0 + slot % 4))


def _tokens(latents: Tensor, position: Tensor, segment: int, is_noised: bool) -> ModalityTokens:
    count = len(latents)
    owner = torch.full((count,), segment, dtype=torch.int64)
    return ModalityTokens(
        latents=latents,
        segment=owner,
        group=torch.zeros(count, dtype=torch.int64),
        position=position.reshape(-1, 3),
        role=torch.full((count,), int(Role.NOISED if is_noised else Role.CLEAN), dtype=torch.int8),
        level=owner.clone(),
        weight=torch.full((count,), float(is_noised)),
    )


def _joined(parts: list[ModalityTokens], channels: int, dtype: torch.dtype) -> ModalityTokens:
    empty = _tokens(torch.zeros(0, channels, dtype=dtype), torch.zeros(0, 3), 0, False)
    fields = [vars(part) for part in [*parts, empty]]
    joined = {name: torch.cat([part[name] for part in fields]) for name in vars(empty)}
    return ModalityTokens(**joined)
