"""Parts of a packed batch by attention group, and an attention op that remembers keys of others.

Shape legend: J tokens of all modalities, G groups of the whole batch, g of a part, H query heads,
K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import torch
from torch import Tensor, nn

from kinodit.models.attention import attend, attend_to, permute
from kinodit.models.mmdit import MMDiT
from kinodit.models.tokens import AttentionLayout, TokenBatch


@dataclass(frozen=True)
class PartLayout(AttentionLayout):
    """The layout of some groups of a batch.

    names: [g] which groups of the whole batch these are
    seen:  [g] the groups of the whole batch that each sees, whether they are in the part or not
    """

    names: tuple[int, ...] = ()
    seen: tuple[tuple[int, ...], ...] = ()


def group_of_tokens(batch: TokenBatch) -> dict[str, Tensor]:
    """Modality -> [N] int64 on the host, the group of each token: its row of the layout's table."""
    layout = batch.layout
    lengths = torch.tensor(layout.lengths, dtype=torch.int64)
    group = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    if layout.inverse is not None:
        group = group[layout.inverse.cpu()]
    sizes = [tokens.num_tokens for tokens in batch.modalities.values()]
    return dict(zip(batch.modalities, group.split(sizes), strict=True))


def select(batch: TokenBatch, groups: Collection[int]) -> tuple[TokenBatch, dict[str, Tensor]]:
    """The tokens of some groups, and modality -> [n] int64 which of its N tokens they are.

    Levels, conditions and samples stay those of the batch, and so does its device.
    """
    names = tuple(sorted(groups))
    place = {name: index for index, name in enumerate(names)}
    found = group_of_tokens(batch)
    wanted = torch.tensor(names, dtype=torch.int64)
    rows = {n: torch.isin(group, wanted).nonzero().squeeze(1) for n, group in found.items()}
    group = torch.cat([found[name][rows[name]] for name in found])
    order = torch.sort(group, stable=True).indices
    whole = batch.layout
    in_order = bool((group[1:] >= group[:-1]).all())
    device = batch.level_t.device
    layout = PartLayout(
        order=None if in_order else order.to(device),
        inverse=None if in_order else torch.argsort(order).to(device),
        lengths=tuple(whole.lengths[name] for name in names),
        segments=tuple(whole.segments[name] for name in names),
        visible=tuple(
            tuple(place[key] for key in whole.visible[name] if key in place) for name in names
        ),
        names=names,
        seen=tuple(whole.visible[name] for name in names),
    )
    modalities = {
        name: tokens.map(lambda x, name=name: x.index_select(0, rows[name].to(device)))  # type: ignore[misc]
        for name, tokens in batch.modalities.items()
    }
    return replace(batch, modalities=modalities, layout=layout), rows


Keys = dict[int, tuple[Tensor, Tensor]]
"""group -> its keys and values, [n, K, D] each."""


@dataclass
class KeyCache:
    """An attention op for parts of a batch: queries see their own part's keys, and remembered ones.

    Blocks of a model call it in turn; each has keys of its own.

    remembers: whether the keys of the part are kept; to be set for clean tokens alone
    """

    remembers: bool = False
    _layers: list[Keys] = field(default_factory=list)
    _turn: int = 0

    @contextmanager
    def used_by(self, model: MMDiT, *, remembers: bool) -> Iterator[None]:
        """Within it the model attends to what is remembered, and its keys are added if so asked."""
        assert can_remember(model), "attention that other processes take part in"
        self.remembers, self._turn = remembers, 0
        model.attend = self
        try:
            yield
        finally:
            model.attend = attend

    @property
    def num_bytes(self) -> int:
        """Memory of what is remembered."""
        return sum(
            x.numel() * x.element_size()
            for layer in self._layers
            for pair in layer.values()
            for x in pair
        )

    def forget(self, groups: Collection[int]) -> None:
        """Drop the keys of groups that nobody will see again."""
        for layer in self._layers:
            for name in groups:
                layer.pop(name, None)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
        """`attend` for a part: q [J, H, D], k and v [J, K, D] -> [J, H, D]."""
        assert isinstance(layout, PartLayout), "a batch that is not a part of another"
        if self._turn == len(self._layers):
            self._layers.append({})
        known = self._layers[self._turn]
        self._turn += 1
        if q.shape[0] == 0:
            return q
        order, inverse = layout.order, layout.inverse
        if order is not None and inverse is not None:
            q, k, v = (permute(x, order, inverse) for x in (q, k, v))
        q_parts, k_parts, v_parts = (x.split(list(layout.lengths)) for x in (q, k, v))
        own = dict(zip(layout.names, zip(k_parts, v_parts, strict=True), strict=True))
        out = torch.cat(
            [
                self._group(part, row, known | own)
                for part, row in zip(q_parts, layout.seen, strict=True)
            ]
        )
        if self.remembers:
            known |= own
        return out if order is None or inverse is None else permute(out, inverse, order)

    @staticmethod
    def _group(q: Tensor, row: tuple[int, ...], keys: Keys) -> Tensor:
        """Queries of one group over the keys of the groups in its row."""
        missing = [name for name in row if name not in keys]
        assert not missing, f"groups {missing} are seen, but neither here nor remembered"
        if not row:
            return torch.zeros_like(q)
        k, v = (torch.cat(parts) for parts in zip(*(keys[name] for name in row), strict=True))
        return attend_to(q, k, v)


def can_remember(model: nn.Module) -> TypeGuard[MMDiT]:
    """Whether nothing but the model itself takes part in its attention."""
    return isinstance(model, MMDiT) and model.attend is attend and model.exchange is None
