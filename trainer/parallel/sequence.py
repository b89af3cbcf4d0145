"""Which tokens of a packed batch each rank of the context-parallel axis holds.

All ranks of the axis are given the same pack. Its tokens, in segment-major order, are dealt out
like cards: token p goes to rank p mod cp. Whatever the lengths of segments, streams and groups,
and whoever sees whom, every rank then has its share of each of them within one token, so that
neither a block-causal mask nor a long clip beside short ones makes one rank wait for another, and
nothing has to be padded. (Striped Attention, Brandon et al., arXiv 2311.09431, does this for
causal language models.)

Shape legend: J tokens of the pack, all modalities; N tokens of one modality; n of them here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kinodit.models.diffusion.objective import NoisedBatch
from kinodit.models.tokens import AttentionLayout, TokenBatch


@dataclass(frozen=True)
class Place:
    """A rank's place on the context-parallel axis of `ulysses` x `ring` ranks.

    Ranks that exchange heads (ulysses) are neighbours; rings go through ranks of equal `head`.
    """

    index: int
    ulysses: int
    ring: int

    @property
    def size(self) -> int:
        """Ranks of the axis."""
        return self.ulysses * self.ring

    @property
    def hop(self) -> int:
        """This rank's place in its ring."""
        return self.index // self.ulysses


@dataclass(frozen=True)
class CutLayout(AttentionLayout):
    """The layout of a whole pack whose tokens are dealt out over ranks.

    `order` and `inverse` turn the tokens that the ulysses group holds together, rank after rank,
    into segment-major order and back; `lengths`, `segments` and `visible` are the whole pack's.

    num_held: tokens of each rank of this ulysses group
    pieces:   for each rank of a ring, how many tokens its ulysses group holds of each group
    """

    num_held: tuple[int, ...] = ()
    pieces: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Cut:
    """This rank's tokens of a pack. rows: modality -> [n] int64, ascending, its tokens among N."""

    rows: Mapping[str, Tensor]
    layout: CutLayout

    def of(self, batch: TokenBatch) -> TokenBatch:
        """This rank's part of the pack that the cut was made for."""
        modalities = {
            name: tokens.map(lambda x, name=name: x.index_select(0, self.rows[name]))  # type: ignore[misc]
            for name, tokens in batch.modalities.items()
        }
        return replace(batch, modalities=modalities, layout=self.layout)

    def of_noised(self, noised: NoisedBatch) -> NoisedBatch:
        """The same of a batch with its noise, which was drawn for all tokens of each sample."""

        def pick(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.index_select(0, self.rows[name]) for name, x in parts.items()}

        return NoisedBatch(self.of(noised.batch), pick(noised.clean), pick(noised.noise))


def share(noised: NoisedBatch, place: Place) -> NoisedBatch:
    """This rank's part of a batch with its noise, which is on the host."""
    return noised if place.size == 1 else cut(noised.batch, place).of_noised(noised)


def cut(batch: TokenBatch, place: Place) -> Cut:
    """Deal the tokens of `batch`, which is on the host, to the ranks of the axis."""
    whole = batch.layout
    num_tokens = batch.num_tokens
    joint_of = torch.arange(num_tokens) if whole.order is None else whole.order
    deal_of = torch.empty_like(joint_of)
    deal_of[joint_of] = torch.arange(num_tokens)
    first = place.hop * place.ulysses
    held = [torch.sort(joint_of[rank :: place.size]).values for rank in range(place.size)]
    together = torch.cat(held[first : first + place.ulysses])
    order = torch.argsort(deal_of[together])
    layout = CutLayout(
        order=order,
        inverse=torch.argsort(order),
        lengths=whole.lengths,
        segments=whole.segments,
        visible=whole.visible,
        num_held=tuple(len(rows) for rows in held[first : first + place.ulysses]),
        pieces=_pieces(whole.lengths, place),
    )
    rows, start = {}, 0
    for name, tokens in batch.modalities.items():
        mine = held[place.index]
        end = start + tokens.num_tokens
        rows[name] = mine[(mine >= start) & (mine < end)] - start
        start = end
    return Cut(rows, layout)


def _pieces(lengths: tuple[int, ...], place: Place) -> tuple[tuple[int, ...], ...]:
    """[ring][group]: tokens of each group that the ranks of one ulysses group are dealt."""

    def dealt(end: int, hop: int) -> int:
        rounds, rest = divmod(end, place.size)
        return rounds * place.ulysses + min(max(rest - hop * place.ulysses, 0), place.ulysses)

    pieces = []
    for hop in range(place.ring):
        start, row = 0, []
        for length in lengths:
            row.append(dealt(start + length, hop) - dealt(start, hop))
            start += length
        pieces.append(tuple(row))
    return tuple(pieces)
