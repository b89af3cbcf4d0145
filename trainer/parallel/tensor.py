"""Tensor parallelism with sequence parallelism, applied to a model by the table of shardings.

Parameters become DTensors over the tp axis; activations stay plain tensors. A module whose
parameters were split keeps its code: what it reads as `self.weight` is this rank's part, or the
whole put together. Tokens cross between ranks at the model's seams alone, all streams of a
half-block in one message (Korthikanti et al., arXiv 2205.05198, section 4.2.2).

Whatever is not split is computed on a rank's own tokens (norms, gates, embeddings, heads) or as a
share of the whole (conditions), so that its gradient is a part of a sum: `sum_whole_gradients`.

Shape legend: n own tokens of a stream, m tokens seen, d width, K rows of the noise-level table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from kinodit.models.context import ALL
from kinodit.models.exchange import Parts, Spot
from kinodit.models.tokens import AttentionLayout, ModalityTokens, TokenBatch
from kinodit.trainer.parallel.collectives import gather_dim, gather_rows, scatter_rows, sum_rows
from kinodit.trainer.parallel.sequence import CutLayout, Dealt
from kinodit.trainer.parallel.table import Row, Split, assign_splits
from kinodit.trainer.parallel.traffic import note, others_share

TOKENS, MODULATION, STORED, WHOLE = "tp", "modulation", "stored weights", "whole gradients"
SCORES = "expert scores"
"""What the messages of the tp axis, and of ranks that share a pack, are for."""


def split_model(model: nn.Module, rows: Sequence[Row], tp_mesh: DeviceMesh) -> None:
    """Split the parameters of `model` over `tp_mesh`, in place, as the table says.

    Every rank has the same whole parameters before, and keeps its part.
    """
    splits = assign_splits(model, rows, tp_mesh.size())
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        mine = {key: splits[f"{name}.{key}" if name else key] for key in own}
        for key, parameter in own.items():
            module.register_parameter(key, _split_parameter(parameter, mine[key], tp_mesh))
        module.__class__ = reading(type(module), mine, tp_mesh)


def _split_parameter(parameter: nn.Parameter, split: Split, tp_mesh: DeviceMesh) -> nn.Parameter:
    local, placement = parameter.detach(), cast(Placement, Replicate())
    if split.dim is not None:
        part = local.shape[split.dim] // tp_mesh.size()
        first = tp_mesh.get_local_rank() * part
        local = local.narrow(split.dim, first, part).clone(memory_format=torch.contiguous_format)
        placement = Shard(split.dim)
    whole = DTensor.from_local(local, tp_mesh, [placement], run_check=False)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def reading(
    kind: type[nn.Module], splits: Mapping[str, Split], tp_mesh: DeviceMesh
) -> type[nn.Module]:
    """A class like `kind` whose forward reads its parameters as plain tensors, as `splits` say.

    They are put in its way for as long as it runs: everybody else meets the DTensors.
    """

    def forward(self: nn.Module, *inputs: Any) -> Any:
        read = {
            key: _read(cast(Tensor, self._parameters[key]), split, tp_mesh)
            for key, split in splits.items()
        }
        self.__dict__.update(read)
        try:
            return kind.forward(self, *inputs)
        finally:
            for key in read:
                del self.__dict__[key]

    return type(f"Split{kind.__name__}", (kind,), {"forward": forward})


def _read(parameter: Tensor, split: Split, tp_mesh: DeviceMesh) -> Tensor:
    local = _local(parameter)
    if split.summed:
        return local / tp_mesh.size()
    if split.part or split.dim is None:
        return local
    return gather_dim(local, split.dim, tp_mesh.get_group(), STORED)


def _local(parameter: Tensor) -> Tensor:
    """This rank's part, through which its gradient flows back: partial ones are summed later.

    An engine that partitions parameters by itself has put that part in the DTensor's place.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    local: Tensor = parameter.to_local(grad_placements=parameter.placements)
    return local


def sum_whole_gradients(model: nn.Module, tp_mesh: DeviceMesh, device: torch.device) -> None:
    """Add up the gradients of parameters that every tp rank has whole, in one message, in place.

    Each rank's is its part of the sum until then, whatever its DTensor claims. `device` is the one
    that talks; gradients may be offloaded to the host.
    """
    parts = []
    for parameter in model.parameters():
        gradient = parameter.grad
        if not isinstance(gradient, DTensor) or gradient.numel() == 0:
            continue
        axis = cast(tuple[str, ...], gradient.device_mesh.mesh_dim_names).index("tp")
        if gradient.placements[axis].is_replicate():
            parts.append(gradient.to_local())
    sum_parts(parts, tp_mesh, device)


def sum_parts(parts: Sequence[Tensor], tp_mesh: DeviceMesh, device: torch.device) -> None:
    """Add `parts`, of any shapes, up over the tp ranks, in one message, in place.

    `device` is the one that talks.
    """
    if not parts:
        return
    total = torch.cat([part.reshape(-1) for part in parts]).to(device)
    note(WHOLE, "all_reduce", 2 * others_share(total, tp_mesh.size()))
    dist.all_reduce(total, group=tp_mesh.get_group())
    for part, piece in zip(parts, total.split([part.numel() for part in parts]), strict=True):
        part.copy_(piece.view_as(part))


@dataclass(frozen=True)
class TokenExchange:
    """Implements `Exchange` for batches that `cut` dealt out.

    group: tp ranks, None for one
    pack:  ranks that share a pack, None for one
    """

    group: ProcessGroup | None
    pack: ProcessGroup | None = None

    def seen(self, name: str, batch: TokenBatch) -> Spot:
        """See `Exchange`."""
        return _cut_layout(batch.layout).spots[name]

    def whole(self, name: str, batch: TokenBatch) -> tuple[ModalityTokens, Tensor]:
        """See `Exchange`."""
        return _cut_layout(batch.layout).wholes[name]

    def gather(self, parts: Parts, layout: AttentionLayout) -> dict[str, Tensor]:
        """See `Exchange`."""
        if self.group is None:
            return dict(parts)
        counts = _cut_layout(layout).counts
        own = dist.get_rank(self.group)
        if ALL in parts:
            pieces = parts[ALL].split([rows[own] for rows in counts.values()])
            return {ALL: torch.cat(gather_rows(pieces, list(counts.values()), self.group, TOKENS))}
        made = gather_rows(
            list(parts.values()), [counts[name] for name in parts], self.group, TOKENS
        )
        return dict(zip(parts, made, strict=True))

    def scatter(self, parts: Parts, layout: AttentionLayout) -> dict[str, Tensor]:
        """See `Exchange`."""
        if self.group is None:
            return dict(parts)
        counts = _cut_layout(layout).counts
        if ALL in parts:
            pieces = parts[ALL].split([sum(rows) for rows in counts.values()])
            return {ALL: torch.cat(scatter_rows(pieces, list(counts.values()), self.group, TOKENS))}
        made = scatter_rows(
            list(parts.values()), [counts[name] for name in parts], self.group, TOKENS
        )
        return dict(zip(parts, made, strict=True))

    def own(self, name: str, seen: Tensor, layout: AttentionLayout) -> Tensor:
        """See `Exchange`."""
        if self.group is None:
            return seen
        counts, rank = _cut_layout(layout).counts, dist.get_rank(self.group)
        pieces, start = [], 0
        for rows in counts.values() if name == ALL else [counts[name]]:
            pieces.append(seen.narrow(0, start + sum(rows[:rank]), rows[rank]))
            start += sum(rows)
        return torch.cat(pieces)

    def gather_pack(
        self, name: str, seen: Tensor, layout: AttentionLayout
    ) -> tuple[Tensor, Tensor]:
        """See `Exchange`. Collective over the ranks that share the pack."""
        return _gather_pack(
            self.own(name, seen, layout), _cut_layout(layout).dealt[name], self.pack
        )

    def join(self, rows: Parts) -> dict[str, Tensor]:
        """See `Exchange`."""
        if self.group is None:
            return dict(rows)
        num_ranks = dist.get_world_size(self.group)
        columns = [part.t() for part in rows.values()]
        counts = [[part.shape[0]] * num_ranks for part in columns]
        made = gather_rows(columns, counts, self.group, MODULATION)
        return {name: part.t() for name, part in zip(rows, made, strict=True)}


@dataclass(frozen=True)
class CopiedTokens:
    """Implements `Exchange` without sequence parallelism: tp ranks have the same tokens.

    Each rank's loss is its fraction of the whole one, and gradients are sums over ranks, so that
    an all-reduce is its own backward, and nothing else has to cross. There are as many messages as
    in Shoeybi et al., arXiv 1909.08053, figure 4.
    """

    among: TokenExchange

    def seen(self, name: str, batch: TokenBatch) -> Spot:
        """See `Exchange`."""
        return self.among.seen(name, batch)

    def whole(self, name: str, batch: TokenBatch) -> tuple[ModalityTokens, Tensor]:
        """See `Exchange`."""
        return self.among.whole(name, batch)

    def gather(self, parts: Parts, layout: AttentionLayout) -> dict[str, Tensor]:
        """See `Exchange`."""
        return dict(parts)

    def scatter(self, parts: Parts, layout: AttentionLayout) -> dict[str, Tensor]:
        """See `Exchange`."""
        assert self.among.group is not None
        made = sum_rows(list(parts.values()), self.among.group, TOKENS)
        return dict(zip(parts, made, strict=True))

    def own(self, name: str, seen: Tensor, layout: AttentionLayout) -> Tensor:
        """See `Exchange`: all that it sees."""
        return seen

    def gather_pack(
        self, name: str, seen: Tensor, layout: AttentionLayout
    ) -> tuple[Tensor, Tensor]:
        """See `Exchange`."""
        return _gather_pack(seen, _cut_layout(layout).dealt[name], self.among.pack)

    def join(self, rows: Parts) -> dict[str, Tensor]:
        """See `Exchange`."""
        return self.among.join(rows)


def _gather_pack(own: Tensor, dealt: Dealt, pack: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """`pack`: ranks that have different tokens of the pack, None for one."""
    if pack is None:
        return own, dealt.rows
    (came,) = gather_rows([own], [dealt.counts], pack, SCORES)
    return torch.empty_like(came).index_copy_(0, dealt.order, came), dealt.rows


def _cut_layout(layout: AttentionLayout) -> CutLayout:
    assert isinstance(layout, CutLayout), "a batch that was not dealt out to the ranks"
    return layout
