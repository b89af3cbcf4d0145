"""A drawn task and the shape of a sample -> role, noise level, weight and group of each token.

Shape legend: N tokens of one stream as they were encoded, n tokens of it in the pack, T frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kinodit.data.region import given_tokens
from kinodit.data.tasks import DrawnTask, TaskConfig, is_dropped
from kinodit.models.random import sample_generator
from kinodit.models.tokens import Role, SampleKey, Visibility, see_all

BLOCK_SLACK = 1e-4
"""Part of a block by which rounding of seconds may move a frame without its changing blocks."""

CONDITION, CONTEXT, NOISED = 0, 1, 2
"""Kinds of tokens: conditions, clean copies of blocks that later ones see, and what is noised."""


class Shape(NamedTuple):
    """Where the tokens of a stream are.

    frame:    [N] int64, the frame of each token; below 0 of reference pictures
    position: [N, 3] float32, seconds, row, column
    is_text:  whether they are features of a caption
    """

    frame: Tensor
    position: Tensor
    is_text: bool


@dataclass(frozen=True)
class Piece:
    """The tokens of one stream of one sample.

    take:     [n] int64, which of the encoded tokens they are; None: all of them in their order
    role:     [n] int8, a `Role`
    level:    [n] int64, row of the sample's levels
    group:    [n] int64, attention group within the sample
    weight:   [n] float32, loss weight
    is_noise: the latents are keyed noise instead of the encoded ones
    """

    take: Tensor | None
    role: Tensor
    level: Tensor
    group: Tensor
    weight: Tensor
    is_noise: bool


@dataclass(frozen=True)
class Assignment:
    """What a task makes of a sample.

    pieces:  stream -> its tokens
    level_t: what the sample's rows of levels start with; those of noised tokens are drawn later
    visible: who sees whom, by group
    """

    pieces: Mapping[str, Piece]
    level_t: tuple[float, ...]
    visible: Visibility


class _Tokens(NamedTuple):
    """[n] each: what `Piece` is made of, before levels and groups are numbered over all streams.

    lot: among the noised tokens, equal for those that share a level
    """

    take: Tensor
    kind: Tensor
    block: Tensor
    lot: Tensor


def assign(task: DrawnTask, shapes: Mapping[str, Shape], key: SampleKey) -> Assignment:
    """The assignment of a sample whose streams have these shapes. A pure function.

    Rows of levels: first those of noised tokens, in the order of streams and frames, then one for
    clean tokens (t = 0), and one for pure noise (t = 1), where there are such. Where a sample has
    one level and nothing forbids it, text is modulated by it, as in SD3; else its level is 0.
    """
    config, found = task.config, {}
    for index, (name, shape) in enumerate(shapes.items()):
        found[name] = _tokens(task, name, shape, index, key)
    lots = [int(lot) for t in found.values() for lot in t.lot[t.kind == NOISED].unique()]
    row_of = {lot: row for row, lot in enumerate(sorted(set(lots)))}
    shares_level = config.levels == "sample" and not config.block_s and not config.one_way
    level_t = [0.0] * len(row_of)

    def row(t: float) -> int:
        if t not in level_t[len(row_of) :]:
            level_t.append(t)
        return len(row_of) + level_t[len(row_of) :].index(t)

    groups = _Groups(config, tuple(shapes), _num_blocks(found.values()))
    pieces = {}
    for index, (name, tokens) in enumerate(found.items()):
        stream = config.stream(name, shapes[name].is_text)
        is_noised, is_noise = tokens.kind == NOISED, stream.use == "noise"
        level = torch.zeros_like(tokens.take)
        if not bool(is_noised.all()) and not (shapes[name].is_text and shares_level):
            level.fill_(row(1.0 if is_noise else 0.0))
        for lot in tokens.lot[is_noised].unique().tolist():
            level[is_noised & (tokens.lot == lot)] = row_of[lot]
        is_whole = torch.equal(tokens.take, torch.arange(len(shapes[name].frame)))
        pieces[name] = Piece(
            take=None if is_whole else tokens.take,
            role=torch.where(is_noised, int(Role.NOISED), int(Role.CLEAN)).to(torch.int8),
            level=level,
            group=groups.of(tokens, index),
            weight=is_noised.to(torch.float32) * stream.loss_weight,
            is_noise=is_noise,
        )
    return Assignment(pieces, tuple(level_t), groups.visible if config.is_restricted else see_all)


def _tokens(task: DrawnTask, name: str, shape: Shape, index: int, key: SampleKey) -> _Tokens:
    """What the task makes of one stream, the `index`-th."""
    config, count = task.config, len(shape.frame)
    stream = config.stream(name, shape.is_text)
    # Text that is absent or dropped is the empty caption, which was put in its place before.
    clean_is_left = shape.is_text or not is_dropped(task, key, name, stream.dropout)
    everything = torch.arange(count)
    if not shape.is_text and (
        stream.use == "absent" or (stream.use == "clean" and not clean_is_left)
    ):
        everything = everything[:0]
    kinds = torch.full((len(everything),), CONDITION)
    block = torch.zeros_like(everything)
    if stream.use != "target":
        return _Tokens(everything, kinds, block, torch.zeros_like(everything))
    kinds.fill_(NOISED)
    own = shape.frame >= 0
    if stream.references == "clean":
        kinds[~own] = CONDITION
    if config.block_s:
        block = torch.floor(shape.position[:, 0] / config.block_s + BLOCK_SLACK).to(torch.int64)
    elif clean_is_left:
        source = sample_generator(task.seed, key, f"task/given/{name}")
        given = given_tokens(stream, shape.frame[own], shape.position[own], source)
        kinds[everything[own][given]] = CONDITION
    lot = {"sample": block, "stream": block, "frame": shape.frame}[config.levels]
    lot = lot if config.levels == "sample" else lot + (index << 32)
    if config.block_s and count:
        # The last block has nobody that sees it clean.
        context = everything[block < block.max()]
        everything = torch.cat([context, everything])
        kinds = torch.cat([torch.full((len(context),), CONTEXT), kinds])
        block, lot = block[everything], lot[everything]
    if stream.references == "clean" and not clean_is_left:
        return _Tokens(everything[own], kinds[own], block[own], lot[own])
    return _Tokens(everything, kinds, block, lot)


def _num_blocks(found: Iterable[_Tokens]) -> int:
    return 1 + max((int(t.block.max()) for t in found if len(t.block)), default=0)


@dataclass(frozen=True)
class _Groups:
    """Numbers groups of tokens that see, and are seen, alike.

    Ascending: conditions, clean blocks, noised blocks; within each by stream, if streams differ.
    """

    config: TaskConfig
    names: tuple[str, ...]
    num_blocks: int

    @property
    def _num_streams(self) -> int:
        return len(self.names) if self.config.hidden else 1

    def of(self, tokens: _Tokens, index: int) -> Tensor:
        """[n] groups of tokens of the `index`-th stream."""
        if not self.config.is_restricted:
            return torch.zeros_like(tokens.take)
        if self.config.block_s:
            rank = torch.where(tokens.kind == CONDITION, 0, 1 + tokens.block)
            rank = rank + torch.where(tokens.kind == NOISED, self.num_blocks, 0)
        else:
            rank = (tokens.kind == NOISED).to(torch.int64) * int(self.config.one_way)
        return rank * self._num_streams + index % self._num_streams

    def visible(self, query: int, key: int) -> bool:
        """Whether tokens of group `query` see those of group `key`."""
        (query, query_stream), (key, key_stream) = (
            divmod(group, self._num_streams) for group in (query, key)
        )
        hidden = self.config.hidden.get(self.names[query_stream], [])
        if self.config.hidden and self.names[key_stream] in hidden:
            return False
        if key == 0 or not (self.config.block_s or self.config.one_way):
            return True
        if self.config.one_way and not self.config.block_s:
            return query == 1
        reach = self.config.context or self.num_blocks
        if query <= self.num_blocks:
            return query - reach <= key <= query
        block = query - self.num_blocks
        return key == query or block - reach <= key < block
