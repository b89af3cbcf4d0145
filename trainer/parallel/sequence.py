"""Which tokens of a packed batch each rank that shares it holds.

All ranks of the cp and tp axes are given the same pack. Its tokens, in stream-major order, are
dealt out like cards: token p goes to share p mod (cp * tp). Whatever the lengths of segments,
streams and groups, and whoever sees whom, every rank then has its share of each stream of each
group within one token, so that neither a block-causal mask nor a long clip beside short ones makes
one rank wait for another, and nothing has to be padded. (Striped Attention, Brandon et al., arXiv
2311.09431, does this for causal language models.)

Norms and gates are computed on a rank's own share; tp ranks put theirs together for the matrices
that they hold parts of, and attention has the tokens that its cp rank's tp ranks hold together.

Shape legend: J tokens of the pack, all modalities; N tokens of one modality; n of them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kinodit.models.config import SINGLE
from kinodit.models.diffusion.objective import NoisedBatch
from kinodit.models.exchange import Spot
from kinodit.models.tokens import AttentionLayout, ModalityTokens, TokenBatch


@dataclass(frozen=True)
class Place:
    """A rank's place among the `ulysses` x `ring` ranks of cp, and among the `tp` ranks of tp.

    tp ranks are neighbours; so are, one level up, ranks that exchange heads (ulysses); rings go
    through ranks that have the same place in their ulysses group.

    Without sequence parallelism tp ranks are dealt nothing of their own: they are `copies` of a
    rank, this one the `copy`-th, that have the same tokens (and `tp` is 1).
    """

    index: int
    ulysses: int
    ring: int
    tp_index: int = 0
    tp: int = 1
    copies: int = 1
    copy: int = 0

    @property
    def cp(self) -> int:
        """Ranks of the context-parallel axis."""
        return self.ulysses * self.ring

    @property
    def num_shares(self) -> int:
        """Ranks that share a pack."""
        return self.cp * self.tp

    @property
    def is_cut(self) -> bool:
        """Whether batches go to ranks together with how they were dealt out."""
        return self.num_shares * self.copies > 1

    @property
    def share(self) -> int:
        """This rank's share of a pack."""
        return self.index * self.tp + self.tp_index

    @property
    def hop(self) -> int:
        """This rank's place in its ring."""
        return self.index // self.ulysses


class Dealt(NamedTuple):
    """How the tokens of a stream, or of all, were dealt out to the ranks that share a pack.

    order:  [t] int64, the place in the pack of each rank's tokens, rank after rank
    rows:   [m] int64, the place in the pack of the tokens on this cp rank
    counts: how many each rank has
    """

    order: Tensor
    rows: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class CutLayout(AttentionLayout):
    """The layout of a whole pack whose tokens are dealt out over ranks.

    `order` and `inverse` turn the tokens that the ulysses group holds together, rank after rank,
    into segment-major order and back; `lengths`, `segments` and `visible` are the whole pack's.
    A cp rank's tokens are stream-major, and in each stream the first tp rank's come first.

    num_held: tokens of each cp rank of this ulysses group
    pieces:   for each rank of a ring, how many tokens its ulysses group holds of each group
    counts:   stream -> its tokens on each tp rank of this cp rank
    spots:    stream -> where its tokens on this cp rank are
    dealt:    stream, and `SINGLE` for all -> how its tokens were dealt out
    wholes:   stream without a loss -> all its tokens, and which of them are this rank's
    """

    num_held: tuple[int, ...] = ()
    pieces: tuple[tuple[int, ...], ...] = ()
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    spots: Mapping[str, Spot] = field(default_factory=dict)
    dealt: Mapping[str, Dealt] = field(default_factory=dict)
    wholes: Mapping[str, tuple[ModalityTokens, Tensor]] = field(default_factory=dict)

    def to(self, device: torch.device) -> CutLayout:
        """The same layout with its tensors on `device`."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        assert self.order is not None and self.inverse is not None
        return replace(
            self,
            order=move(self.order),
            inverse=move(self.inverse),
            spots={name: Spot(*map(move, spot)) for name, spot in self.spots.items()},
            dealt={
                name: Dealt(move(one.order), move(one.rows), one.counts)
                for name, one in self.dealt.items()
            },
            wholes={name: (t.map(move), move(own)) for name, (t, own) in self.wholes.items()},
        )


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
    """This rank's part of a batch with its noise, which is on the host.

    Of tokens that several ranks have, each counts its part: losses and gradients stay sums over
    ranks.
    """
    if not place.is_cut:
        return noised
    mine = cut(noised.batch, place).of_noised(noised)
    if place.copies == 1:
        return mine
    modalities = {
        name: replace(tokens, weight=tokens.weight / place.copies)
        for name, tokens in mine.batch.modalities.items()
    }
    return replace(mine, batch=replace(mine.batch, modalities=modalities))


def cut(batch: TokenBatch, place: Place) -> Cut:
    """Deal the tokens of `batch`, which is on the host, to the ranks that share it."""
    whole, names = batch.layout, list(batch.modalities)
    sizes = [tokens.num_tokens for tokens in batch.modalities.values()]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    dealt = deal(sizes, place.num_shares)
    first = place.hop * place.ulysses
    held = [
        [shares[cp * place.tp : (cp + 1) * place.tp] for shares in dealt]
        for cp in range(first, first + place.ulysses)
    ]
    mine = held[place.index - first]
    rows = {name: parts[place.tp_index] for name, parts in zip(names, mine, strict=True)}
    together = torch.cat(
        [torch.cat(parts) + start for one in held for parts, start in zip(one, starts, strict=True)]
    )
    in_order = together if whole.inverse is None else whole.inverse[together]
    order = torch.argsort(in_order)
    layout = CutLayout(
        order=order,
        inverse=torch.argsort(order),
        lengths=whole.lengths,
        segments=whole.segments,
        visible=whole.visible,
        num_held=tuple(sum(len(x) for parts in one for x in parts) for one in held),
        pieces=pieces_of(whole, place),
        counts={
            name: tuple(len(x) for x in parts) for name, parts in zip(names, mine, strict=True)
        },
        spots={
            name: _spot(batch.modalities[name], torch.cat(parts))
            for name, parts in zip(names, mine, strict=True)
        },
        dealt=_dealt(dict(zip(names, dealt, strict=True)), starts, place),
        wholes={
            name: (tokens, rows[name])
            for name, tokens in batch.modalities.items()
            if not bool(tokens.weight.any())
        },
    )
    return Cut(rows, layout)


def deal(sizes: Sequence[int], num_shares: int) -> list[list[Tensor]]:
    """[stream][share] -> int64, the tokens among the stream's `sizes` that the share is dealt."""
    dealt, start = [], 0
    for size in sizes:
        rows = torch.arange(size)
        dealt.append([rows[(one - start) % num_shares :: num_shares] for one in range(num_shares)])
        start += size
    return dealt


def _dealt(
    dealt: Mapping[str, Sequence[Tensor]], starts: Sequence[int], place: Place
) -> dict[str, Dealt]:
    """`dealt`: stream -> share -> its tokens; `starts`: where each stream begins."""

    def among(streams: Mapping[str, Sequence[Tensor]]) -> Dealt:
        shares = [torch.cat(parts) for parts in zip(*streams.values(), strict=True)]
        held = slice(place.index * place.tp, (place.index + 1) * place.tp)
        mine = [part for parts in streams.values() for part in parts[held]]
        return Dealt(torch.cat(shares), torch.cat(mine), tuple(map(len, shares)))

    joint = {
        name: [part + start for part in parts]
        for (name, parts), start in zip(dealt.items(), starts, strict=True)
    }
    return {SINGLE: among(joint)} | {name: among({name: parts}) for name, parts in dealt.items()}


def _spot(tokens: ModalityTokens, rows: Tensor) -> Spot:
    return Spot(tokens.position.index_select(0, rows), tokens.level.index_select(0, rows))


def pieces_of(layout: AttentionLayout, place: Place) -> tuple[tuple[int, ...], ...]:
    """[ring][group]: tokens of each group that the ranks of one ulysses group are dealt."""
    num_groups = len(layout.lengths)
    lengths = torch.tensor(layout.lengths, dtype=torch.int64)
    group = torch.repeat_interleave(torch.arange(num_groups), lengths)
    if layout.inverse is not None:
        group = group[layout.inverse]
    hop = torch.arange(len(group)) % place.num_shares // (place.ulysses * place.tp)
    found = torch.bincount(hop * num_groups + group, minlength=place.ring * num_groups)
    return tuple(tuple(row) for row in found.view(place.ring, num_groups).tolist())
