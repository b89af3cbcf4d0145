"""Generation of a sample block by block: each is drawn while those before it are clean.

A batch with blocks (ACDiT, arXiv 2412.07720) has groups of noised tokens that do not see each
other: the stages of a rollout. What is clean never sees what is noised, so that its keys and values
do not change while a block is drawn: they can be computed once, and remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kinodit.models.diffusion.field import Network, velocity_field
from kinodit.models.diffusion.objective import Objective
from kinodit.models.diffusion.samplers import Method, VelocityFn, sample
from kinodit.models.mmdit import MMDiT
from kinodit.models.parts import KeyCache, group_of_tokens, select
from kinodit.models.tokens import ModalityTokens, Role, TokenBatch

Latents = Mapping[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """Groups of one block, as rows of the layout's table.

    noised:  those that are drawn in it
    context: clean ones that it sees, and no stage before it did; in the first, the conditions
    """

    noised: frozenset[int]
    context: frozenset[int]


def stages(batch: TokenBatch) -> list[Stage]:
    """The stages of a batch of one sample, in order.

    Raises ValueError if clean tokens see noised ones: then nothing is known before all is.
    """
    visible = batch.layout.visible
    is_noised = [False] * len(visible)
    for name, group in group_of_tokens(batch).items():
        for index in group[batch.modalities[name].role.cpu() == int(Role.NOISED)].unique().tolist():
            is_noised[index] = True
    for query, row in enumerate(visible):
        if not is_noised[query] and any(is_noised[key] for key in row):
            raise ValueError("clean tokens see noised ones: they have no keys before all is drawn")
    blocks: list[set[int]] = []
    for query in (index for index, noised in enumerate(is_noised) if noised):
        linked = {query, *(key for key in visible[query] if is_noised[key])}
        joined = [block for block in blocks if block & linked]
        blocks = [block for block in blocks if not block & linked]
        blocks.append(linked.union(*joined))

    def context(block: set[int]) -> set[int]:
        """What the block's tokens depend on, through any number of layers."""
        found = {key for query in block for key in visible[query]} - block
        while more := {key for query in found for key in visible[query]} - found:
            found |= more
        return found

    ordered = sorted((max(context(block), default=-1), min(block), block) for block in blocks)
    made, known = [], set[int]()
    for _, _, block in ordered:
        made.append(Stage(frozenset(block), frozenset(context(block) - known)))
        known |= context(block)
    return made


class Part(NamedTuple):
    """A stage, ready to be drawn.

    velocity: of the tokens of `batch`
    batch:    the tokens that are computed in it
    rows:     modality -> [n] int64, which of the whole batch's tokens they are
    """

    velocity: VelocityFn
    batch: TokenBatch
    rows: Mapping[str, Tensor]


class Blocks:
    """The velocity of one block after the other of a batch of one sample.

    With a model that no other process takes part in, clean keys are remembered; else everything
    that a block depends on is computed with it. Both give the same, up to the rounding of matrix
    products of other sizes.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        batch: TokenBatch,
        model: MMDiT | None = None,
    ) -> None:
        """`model`: what `network` calls, if its keys may be remembered; None: they are not."""
        self.stages = stages(batch)
        self._network, self._objective, self._batch = network, objective, batch
        self._model, self._cache = model, KeyCache()
        self._known: frozenset[int] = frozenset()
        self._copies = {name: _copies(tokens) for name, tokens in batch.modalities.items()}

    @property
    def num_bytes(self) -> int:
        """Memory of what is remembered."""
        return self._cache.num_bytes

    @property
    def latents(self) -> Latents:
        """Modality -> [N, C] of the whole batch, with what was settled."""
        return {name: tokens.latents for name, tokens in self._batch.modalities.items()}

    def begin(self, index: int) -> Part:
        """Stage `index`; all before it must have been settled."""
        stage = self.stages[index]
        self._known |= stage.context
        model = self._model
        if model is None:
            batch, rows = select(self._batch, self._known | stage.noised)
            return Part(velocity_field(self._network, self._objective, batch), batch, rows)
        self._remember(stage.context, model)
        self._cache.forget(self._known - self._seen_from(index))
        batch, rows = select(self._batch, stage.noised)

        def network(part: TokenBatch) -> Latents:
            with self._cache.used_by(model, remembers=False):
                return self._network(part)

        return Part(velocity_field(network, self._objective, batch), batch, rows)

    def _remember(self, groups: frozenset[int], model: MMDiT) -> None:
        if not groups:
            return
        clean, _ = select(self._batch, groups)
        with self._cache.used_by(model, remembers=True):
            self._network(clean)

    def _seen_from(self, index: int) -> set[int]:
        """Groups that stage `index`, or anything computed after it, sees."""
        queries = set(self.stages[index].noised)
        for later in self.stages[index + 1 :]:
            queries |= later.noised | later.context
        return {key for query in queries for key in self._batch.layout.visible[query]}

    def settle(self, part: Part, drawn: Latents) -> None:
        """Keep what was drawn in a stage, modality -> [n, C], and let later stages see it clean."""
        changed = {}
        for name, latents in drawn.items():
            tokens = self._batch.modalities[name]
            whole = tokens.latents.clone()
            whole[part.rows[name].to(whole.device)] = latents.to(whole.dtype)
            clean, noised = self._copies[name]
            own = torch.isin(noised, part.rows[name])
            whole[clean[own].to(whole.device)] = whole[noised[own].to(whole.device)]
            changed[name] = whole
        self._batch = self._batch.with_latents(changed)


def _copies(tokens: ModalityTokens) -> tuple[Tensor, Tensor]:
    """[m] int64 each: clean tokens that are at the place of a noised one, and that one."""
    is_noised = (tokens.role == int(Role.NOISED)).tolist()
    places = [tuple(place) for place in tokens.position.tolist()]
    noised = {place: row for row, place in enumerate(places) if is_noised[row]}
    pairs = [
        (row, noised[place])
        for row, place in enumerate(places)
        if not is_noised[row] and place in noised
    ]
    clean, copied = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.tensor(clean, dtype=torch.int64), torch.tensor(copied, dtype=torch.int64)


Combine = Callable[[Sequence[VelocityFn], TokenBatch], VelocityFn]
"""Velocities of the same tokens under several conditions, and these tokens -> one velocity."""


def roll_out(
    blocks: Sequence[Blocks], combine: Combine, noise: Latents, times: Tensor, method: Method
) -> Latents:
    """Draw all blocks in turn; modality -> [N, C] of the whole batch.

    blocks: the same batch under several conditions
    noise:  modality -> [N, C], what noised tokens start from
    times:  levels from 1 to 0 of every block
    """
    for index in range(len(blocks[0].stages)):
        parts = [one.begin(index) for one in blocks]
        first = parts[0]
        start = {}
        for name, all_noise in noise.items():
            tokens = first.batch.modalities[name]
            own = all_noise.index_select(0, first.rows[name].to(all_noise.device))
            is_noised_n1 = (tokens.role == int(Role.NOISED)).unsqueeze(-1)
            start[name] = torch.where(is_noised_n1, own, tokens.latents.to(own.dtype))
        velocity = combine([part.velocity for part in parts], first.batch)
        drawn = sample(velocity, start, times, method)
        for one, part in zip(blocks, parts, strict=True):
            one.settle(part, drawn)
    return blocks[0].latents
