"""Encoded samples -> one packed `TokenBatch`, and back: patches, positions, levels, layout.

Shape legend: C channels of a latent or of a text feature, t/h/w latent frames, rows and columns,
pt/ph/pw the same of a patch, N tokens, S segments, K rows of the table of noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from kinodit.data.assignment import Assignment, Piece, Shape, assign
from kinodit.data.tasks import DrawnTask
from kinodit.models.errors import ConfigError
from kinodit.models.random import normal, sample_generator
from kinodit.models.tokens import (
    AttentionLayout,
    ModalityTokens,
    Role,
    SampleKey,
    TokenBatch,
    Visibility,
    build_layout,
    see_all,
)

Patch = tuple[int, int, int]
LevelsPer = Literal["segment", "frame"]


@dataclass(frozen=True)
class StreamSpec:
    """One modality of the joint sequence.

    name:     as in the model
    channels: C, of a latent or of a text feature, before patches are made
    patch:    (pt, ph, pw) latent cells of a token; None for a stream of feature vectors (text),
              whose tokens are clean and have no loss
    """

    name: str
    channels: int
    patch: Patch | None = None

    @property
    def token_channels(self) -> int:
        """Channels of one token."""
        if self.patch is None:
            return self.channels
        pt, ph, pw = self.patch
        return self.channels * pt * ph * pw


@dataclass(frozen=True)
class PackSpec:
    """What every pack of a run has in common, so that an empty one looks like the others.

    streams:    in the order of the joint sequence (the model's)
    conditions: name -> D, the condition vectors of each segment
    levels_per: noise levels are drawn per segment, or per row of patches in time ("frame")
    """

    streams: tuple[StreamSpec, ...]
    conditions: Mapping[str, int] = field(default_factory=dict)
    levels_per: LevelsPer = "segment"


@dataclass(frozen=True)
class EncodedSample:
    """One sample as the model's inputs, before packing.

    latents:    modality -> [C, t, h, w] float; a modality the sample does not have is left out
    seconds:    modality -> seconds from one latent frame to the next
    text:       stream -> [L, C] float, features of the caption
    conditions: name -> [D] float
    task:       what its tokens are for; None: everything is generated from the text
    references: modality -> latents [C, t, h, w] of pictures of any sizes, which come one after the
                other before the first frame, in negative time; they take part where the task says
                so. A modality that is in `latents`
    """

    key: SampleKey
    latents: Mapping[str, Tensor]
    seconds: Mapping[str, float]
    text: Mapping[str, Tensor]
    conditions: Mapping[str, Tensor]
    task: DrawnTask | None = None
    references: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def pictures(self, name: str) -> list[Tensor]:
        """The latents of a modality, after those of its references that take part."""
        own = self.latents[name]
        if self.task is None or self.task.config.stream(name, False).references == "absent":
            return [own]
        return [*self.references.get(name, ()), own]


def patch_grid(shape: Sequence[int], patch: Patch) -> tuple[int, int, int]:
    """Patches along time, rows and columns of latents [C, t, h, w].

    Raises ConfigError if the patch does not divide the latents.
    """
    cells = tuple(shape[1:])
    if len(cells) != 3 or any(c % p or c < 1 for c, p in zip(cells, patch, strict=True)):
        raise ConfigError(
            f"latents of {' x '.join(map(str, cells))} (frames, rows, columns) do not divide into "
            f"patches of {' x '.join(map(str, patch))}: change data.num_frames, height or width, "
            "or the model's patch"
        )
    (t, h, w), (pt, ph, pw) = cells, patch
    return t // pt, h // ph, w // pw


def patchify(latents: Tensor, patch: Patch) -> Tensor:
    """[C, t, h, w] -> [N, C * pt * ph * pw].

    Tokens run over time, then rows, then columns (columns fastest); within a token, values run
    over channel, then time, row and column of the patch (column fastest): the order of a Conv3d
    weight [D, C, pt, ph, pw] flattened.
    """
    t, h, w = patch_grid(latents.shape, patch)
    pt, ph, pw = patch
    cells = latents.reshape(latents.shape[0], t, pt, h, ph, w, pw)
    return cells.permute(1, 3, 5, 0, 2, 4, 6).reshape(t * h * w, -1)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: Patch) -> Tensor:
    """[N, C * pt * ph * pw] with N = t * h * w patches of `grid` -> [C, t * pt, h * ph, w * pw]."""
    (t, h, w), (pt, ph, pw) = grid, patch
    cells = tokens.reshape(t, h, w, -1, pt, ph, pw)
    return cells.permute(3, 0, 4, 1, 5, 2, 6).reshape(-1, t * pt, h * ph, w * pw)


def positions(grid: tuple[int, int, int], patch_s: float) -> Tensor:
    """[N, 3] float32: seconds, row and column of each patch, in the order of `patchify`.

    Args:
        grid: patches along time, rows and columns.
        patch_s: seconds from one patch to the next in time.
    """
    t, h, w = (torch.arange(length, dtype=torch.float32) for length in grid)
    return torch.cartesian_prod(t * patch_s, h, w).reshape(-1, 3)


def pack(samples: Sequence[EncodedSample], spec: PackSpec) -> TokenBatch:
    """One pack of `samples`, each a segment, without padding.

    Latents become noised tokens of weight 1, text clean tokens of weight 0 at position (0, 0, 0).
    A segment's rows of the table of noise levels are adjacent; with levels per frame its row r is
    for patches at time r, and text has row 0. Levels are 0 until an objective draws them. A sample
    with a task has roles, rows, weights and groups of its own (`kinodit.data.assignment`). Latents
    stay on their device; everything else is on the host, where the layout is computed.

    Raises:
        ConfigError: latents that do not divide into patches, or channels that are not the spec's.
    """
    if not samples:
        return filler(spec)
    parts: dict[str, list[ModalityTokens]] = {stream.name: [] for stream in spec.streams}
    level_segment: list[int] = []
    level_t: list[float] = []
    visible: list[Visibility] = []
    for segment, sample in enumerate(samples):
        first_level, num_levels = len(level_segment), 1
        if sample.task is not None:
            assignment, tokens = _assigned(sample, spec, segment, first_level)
            for name, part in tokens.items():
                parts[name].append(part)
            level_segment += [segment] * len(assignment.level_t)
            level_t += assignment.level_t
            visible.append(assignment.visible)
            continue
        visible.append(see_all)
        for stream in spec.streams:
            latents, position, times = _tokens(sample, stream)
            if spec.levels_per == "frame" and stream.patch is not None and len(times):
                num_levels = max(num_levels, int(times.max()) + 1)
                level = first_level + times
            else:
                level = torch.full((len(latents),), first_level)
            parts[stream.name].append(_stream_tokens(latents, position, level, segment, stream))
        level_segment += [segment] * num_levels
        level_t += [0.0] * num_levels
    modalities = {name: _join(of_samples) for name, of_samples in parts.items()}
    return TokenBatch(
        modalities=modalities,
        level_segment=torch.tensor(level_segment),
        level_t=torch.tensor(level_t),
        conditions={
            name: _conditions(samples, name, size) for name, size in spec.conditions.items()
        },
        layout=build_layout(list(modalities.values()), visible),
        samples=tuple(sample.key for sample in samples),
    )


def filler(spec: PackSpec) -> TokenBatch:
    """An empty pack: no segments and no tokens, with the streams and channels of the others."""
    modalities = {
        stream.name: _stream_tokens(
            torch.zeros(0, stream.token_channels),
            torch.zeros(0, 3),
            torch.zeros(0, dtype=torch.int64),
            0,
            stream,
        )
        for stream in spec.streams
    }
    return TokenBatch(
        modalities=modalities,
        level_segment=torch.zeros(0, dtype=torch.int64),
        level_t=torch.zeros(0),
        conditions={name: torch.zeros(0, size) for name, size in spec.conditions.items()},
        layout=build_layout(list(modalities.values())),
        samples=(),
    )


def concatenate(batches: Sequence[TokenBatch]) -> TokenBatch:
    """One pack with the segments of all `batches` in their order: what `pack` of all would give.

    Each segment keeps its groups and their visibility. The batches must be on the host, and have
    the same streams and conditions.
    """
    first = batches[0]
    shifted: dict[str, list[ModalityTokens]] = {name: [] for name in first.modalities}
    level_segment: list[Tensor] = []
    segments = levels = 0
    for batch in batches:
        for name, tokens in batch.modalities.items():
            shifted[name].append(
                replace(tokens, segment=tokens.segment + segments, level=tokens.level + levels)
            )
        level_segment.append(batch.level_segment + segments)
        segments += batch.num_segments
        levels += len(batch.level_segment)
    modalities = {name: _join(tokens) for name, tokens in shifted.items()}
    conditions = {
        name: torch.cat([batch.conditions[name] for batch in batches]) for name in first.conditions
    }
    return TokenBatch(
        modalities=modalities,
        level_segment=torch.cat(level_segment),
        level_t=torch.cat([batch.level_t for batch in batches]),
        conditions=conditions,
        layout=_join_layouts(build_layout(list(modalities.values())), batches),
        samples=tuple(key for batch in batches for key in batch.samples),
    )


def split(values: Tensor, batch: TokenBatch, modality: str) -> list[Tensor]:
    """The rows of each segment in `values` [N, ...], one per token of `modality`: S tensors."""
    segment = batch.modalities[modality].segment
    lengths = torch.bincount(segment, minlength=batch.num_segments)
    return list(torch.split(values, lengths.tolist()))


def _tokens(sample: EncodedSample, stream: StreamSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [N, C], positions [N, 3] and the row of patches in time [N] of one stream."""
    if stream.patch is None:
        found = sample.text.get(stream.name, torch.zeros(0, stream.channels))
        _check_channels(sample, stream, found.shape[-1])
        zeros = torch.zeros(len(found), 3)
        return found, zeros, torch.zeros(len(found), dtype=torch.int64)
    if stream.name not in sample.latents:
        empty = torch.zeros(0, stream.token_channels)
        return empty, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    pictures = sample.pictures(stream.name)
    patch_s = sample.seconds[stream.name] * stream.patch[0]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for picture in pictures:
        _check_channels(sample, stream, picture.shape[0])
    grids = [patch_grid(picture.shape, stream.patch) for picture in pictures]
    first = -sum(grid[0] for grid in grids[:-1])
    for picture, grid in zip(pictures, grids, strict=True):
        place = positions(grid, patch_s)
        times = torch.arange(grid[0]).repeat_interleave(grid[1] * grid[2])
        if first:
            place[:, 0] += first * patch_s
            times += first
        parts.append((patchify(picture, stream.patch), place, times))
        first += grid[0]
    if len(parts) == 1:
        return parts[0]
    tokens, place, times = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens, place, times


def _assigned(
    sample: EncodedSample, spec: PackSpec, segment: int, first_level: int
) -> tuple[Assignment, dict[str, ModalityTokens]]:
    """A sample's assignment by its task, and its tokens by it."""
    assert sample.task is not None
    encoded = {stream.name: _tokens(sample, stream) for stream in spec.streams}
    shapes = {
        stream.name: Shape(encoded[stream.name][2], encoded[stream.name][1], stream.patch is None)
        for stream in spec.streams
    }
    assignment = assign(sample.task, shapes, sample.key)
    tokens = {}
    for name, piece in assignment.pieces.items():
        latents, position, _ = encoded[name]
        if piece.is_noise:
            source = sample_generator(sample.task.seed, sample.key, f"task/noise/{name}")
            latents = normal(source, latents.shape).to(latents)
        tokens[name] = _placed(piece, latents, position, segment, first_level)
    return assignment, tokens


def _placed(
    piece: Piece, latents: Tensor, position: Tensor, segment: int, first_level: int
) -> ModalityTokens:
    """The tokens of a piece, from all `latents` [N, C] and `position` [N, 3] of its stream."""
    if piece.take is not None:
        latents = latents.index_select(0, piece.take.to(latents.device))
        position = position.index_select(0, piece.take)
    return ModalityTokens(
        latents=latents,
        segment=torch.full_like(piece.level, segment),
        group=piece.group,
        position=position,
        role=piece.role,
        level=piece.level + first_level,
        weight=piece.weight,
    )


def _check_channels(sample: EncodedSample, stream: StreamSpec, found: int) -> None:
    if found != stream.channels:
        raise ConfigError(
            f"stream {stream.name!r} has {stream.channels} channels, but sample "
            f"{sample.key.sample} was encoded to {found}: the encoder and the model do not fit"
        )


def _stream_tokens(
    latents: Tensor, position: Tensor, level: Tensor, segment: int, stream: StreamSpec
) -> ModalityTokens:
    count = len(latents)
    noised = stream.patch is not None
    return ModalityTokens(
        latents=latents,
        segment=torch.full((count,), segment),
        group=torch.zeros(count, dtype=torch.int64),
        position=position,
        role=torch.full((count,), Role.NOISED if noised else Role.CLEAN, dtype=torch.int8),
        level=level,
        weight=torch.full((count,), float(noised)),
    )


def _join(parts: Sequence[ModalityTokens]) -> ModalityTokens:
    # A sample without the modality contributes no rows; its empty tensor may lie elsewhere.
    present = [part for part in parts if part.num_tokens] or parts[:1]
    columns = {name: [getattr(part, name) for part in present] for name in vars(present[0])}
    return ModalityTokens(**{name: torch.cat(column) for name, column in columns.items()})


def _conditions(samples: Sequence[EncodedSample], name: str, size: int) -> Tensor:
    vectors = [sample.conditions[name] for sample in samples]
    for sample, vector in zip(samples, vectors, strict=True):
        if vector.shape != (size,):
            raise ConfigError(
                f"condition {name!r} has {size} channels, but sample {sample.key.sample} was "
                f"encoded to {tuple(vector.shape)}: the encoder and the model do not fit"
            )
    return torch.stack(vectors)


def _join_layouts(merged: AttentionLayout, batches: Sequence[TokenBatch]) -> AttentionLayout:
    """`merged` (whose order and lengths are right) with the visibility each batch had."""
    visible: list[tuple[int, ...]] = []
    for batch in batches:
        groups = len(visible)
        visible += [tuple(groups + key for key in row) for row in batch.layout.visible]
    return replace(merged, visible=tuple(visible))
