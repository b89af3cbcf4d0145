"""A forward of whole batches by ranks that share them: cut, compute, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kinodit.models.tokens import AttentionLayout, TokenBatch
from kinodit.trainer.parallel.collectives import gather_rows
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.sequence import Cut, CutLayout, cut, deal

Forward = Callable[[TokenBatch], Mapping[str, Tensor]]
NUM_KEPT = 4


class SharedForward:
    """Calls `forward` with this rank's tokens, and returns the predictions for all tokens.

    Of a batch that is cut already, `forward`'s own predictions for this rank's tokens.

    Sampling asks for the same few batches again and again, with other latents: their cuts are kept.
    """

    def __init__(self, forward: Forward, mesh: Mesh) -> None:
        self._forward, self._mesh = forward, mesh
        self._kept: list[tuple[AttentionLayout, Cut]] = []

    def __call__(self, batch: TokenBatch) -> dict[str, Tensor]:
        """stream -> [N, C], the same on every rank that shares the batch. Collective."""
        if isinstance(batch.layout, CutLayout):
            return dict(self._forward(batch))
        names = list(batch.modalities)
        sizes = [tokens.num_tokens for tokens in batch.modalities.values()]
        predictions = self._forward(self._cut(batch).of(batch))
        if self._mesh.pack is None:
            # Ranks that are copies of each other have them all.
            assert self._mesh.place.num_shares == 1
            return dict(predictions)
        rows = dict(zip(names, deal(sizes, self._mesh.place.num_shares), strict=True))
        counts = [[len(one) for one in rows[name]] for name in predictions]
        gathered = gather_rows(list(predictions.values()), counts, self._mesh.pack, "predictions")
        whole = {}
        for name, part in zip(predictions, gathered, strict=True):
            order = torch.argsort(torch.cat(rows[name])).to(part.device)
            whole[name] = part.index_select(0, order)
        return whole

    def _cut(self, batch: TokenBatch) -> Cut:
        for layout, made in self._kept:
            if layout is batch.layout:
                return made
        on_host = cut(batch.to(torch.device("cpu")), self._mesh.place)
        device = self._mesh.device
        rows = {name: one.to(device) for name, one in on_host.rows.items()}
        made = Cut(rows, on_host.layout.to(device))
        self._kept = [*self._kept[-NUM_KEPT + 1 :], (batch.layout, made)]
        return made
