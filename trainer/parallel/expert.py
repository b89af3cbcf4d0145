"""Expert parallelism: each rank has some of the experts, and tokens travel to theirs and back.

The ep axis overlaps dp_shard x cp: ranks that have packs, or parts of a pack, of their own
(Lepikhin et al., "GShard", arXiv 2006.16668, section 3). What tokens need is known only once they
are routed: each rank tells the others how many rows come for each expert, and sends exactly those.

An expert's gradient is complete on the ranks that have it, but for replicas: FSDP2 sums it over
those ranks alone that have the same experts.

Shape legend: E experts, G of them on each rank, n ranks of the ep axis, R rows here, d width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from kinodit.models.attention import permute
from kinodit.models.errors import ConfigError
from kinodit.models.moe.experts import Beside, Experts
from kinodit.models.moe.layer import moe_layers
from kinodit.trainer.parallel.collectives import Journey, all_to_all
from kinodit.trainer.parallel.table import Split
from kinodit.trainer.parallel.tensor import reading
from kinodit.trainer.parallel.traffic import note

EXPERTS, COUNTS = "experts", "expert counts"
"""What the messages of the ep axis are for."""


class ExpertExchange:
    """Implements `ExpertOp` where the ranks of `group` have the experts between them."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def __call__(
        self, experts: nn.Module, x: Tensor, counts: Tensor, beside: Beside | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `ExpertOp`. Collective over the ranks of the group, with any rows or none.

        Two messages forward and two backward, and one of counts, for which the host waits. What is
        computed beside is so while rows are on their way to experts, and its backward while their
        gradients are on their way back.
        """
        num_ranks = dist.get_world_size(self._group)
        sent = counts.view(num_ranks, -1)
        arriving = torch.empty_like(sent)
        note(COUNTS, "all_to_all", arriving.nbytes // num_ranks * (num_ranks - 1))
        dist.all_to_all_single(arriving, sent.contiguous(), group=self._group)
        send_rows, receive_rows = rows_of(sent, arriving, len(x))
        journey = Journey(self._group, EXPERTS)
        begun = journey.begin(x, send_rows, receive_rows)
        made_beside = None if beside is None else beside()
        came = journey.arrive(begun)
        order = by_expert(arriving, len(came))
        inverse = torch.argsort(order)
        made = permute(experts(permute(came, order, inverse), arriving.sum(0)), inverse, order)
        back = all_to_all(made, receive_rows, send_rows, self._group, EXPERTS)
        return back, made_beside


def rows_of(sent: Tensor, arriving: Tensor, num_rows: int) -> tuple[list[int], list[int]]:
    """How many of `num_rows` rows go to each rank, and how many come. The host waits for them."""
    send_rows, receive_rows = torch.stack((sent.sum(1), arriving.sum(1))).tolist()
    assert sum(send_rows) == num_rows, (send_rows, num_rows)
    return send_rows, receive_rows


def by_expert(arriving: Tensor, num_rows: int) -> Tensor:
    """[num_rows] int64: the rows that came, rank after rank, in the order of experts.

    arriving: [n, G], rows from each rank for each expert here. Rows of one expert stay in the order
    of ranks, which is that of tokens dealt out in order.
    """
    experts = torch.arange(arriving.shape[1], device=arriving.device).repeat(arriving.shape[0])
    owners = torch.repeat_interleave(experts, arriving.flatten(), output_size=num_rows)
    return owners.sort(stable=True).indices


def deal_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each rank its experts of the whole `model`, in place; hidden units may be split before.

    mesh: its last axes are ep, and tp if hidden units are split.

    Raises:
        ConfigError: there are no experts, or the ranks do not divide them.
    """
    check_pools(model, mesh["ep"].size())
    for layer in moe_layers(model).values():
        _deal(layer.experts, mesh)


def check_pools(model: nn.Module, degree: int) -> None:
    """Whether `degree` ranks can have the experts of every pool between them.

    Raises:
        ConfigError: there are no experts, or the ranks do not divide them.
    """
    layers = moe_layers(model)
    if not layers:
        raise ConfigError(
            f"parallel.ep={degree}, but the model has no experts: set model.experts, or "
            "parallel.ep=1"
        )
    for name, layer in layers.items():
        count = layer.config.num_experts
        if count % degree:
            raise ConfigError(
                f"parallel.ep={degree} does not divide the {count} experts of {name}: change "
                "parallel.ep or num_experts"
            )


def _deal(experts: Experts, mesh: DeviceMesh) -> None:
    degree, rank = mesh["ep"].size(), mesh["ep"].get_local_rank()
    own = dict(experts.named_parameters(recurse=False))
    is_split = any(isinstance(parameter, DTensor) for parameter in own.values())
    axes = mesh["ep", "tp"] if is_split else mesh["ep"]
    for key, parameter in own.items():
        local, placements = parameter.detach(), [cast(Placement, Shard(0))]
        if isinstance(local, DTensor):
            placements += local.placements
            local = local.to_local()
        part = local.shape[0] // degree
        mine = local.narrow(0, rank * part, part).clone()
        whole = DTensor.from_local(mine, axes, placements, run_check=False)
        made = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        experts.register_parameter(key, made)
    if not is_split:
        parts = dict.fromkeys(own, Split(0, part=True))
        experts.__class__ = cast(type[Experts], reading(type(experts), parts, mesh["ep"]))
