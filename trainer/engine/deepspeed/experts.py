"""Experts that ranks have between them (`parallel.ep`), told to DeepSpeed in its own words.

It partitions every parameter over all data-parallel ranks, but for experts: those over the ranks
that have the same ones. It knows them by attributes of parameters and by names of process groups.
Modules of its own set both; here they are set for ours, and the groups are the mesh's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_process_group_ranks

from kinodit.models.moe.layer import moe_layers
from kinodit.trainer.engine.shells import Shell, Shells
from kinodit.trainer.engine.spans import row_spans
from kinodit.trainer.optim.base import Group
from kinodit.trainer.parallel.mesh import Mesh


@dataclass(frozen=True)
class Dealt:
    """Where experts lie. same: the ranks that have the same ones; every: those that have all."""

    same: ProcessGroup
    every: ProcessGroup

    @classmethod
    def of(cls, mesh: Mesh) -> Self | None:
        """None where every rank has all experts."""
        if mesh.expert_mesh is None:
            return None
        return cls(mesh.expert_mesh.get_group("dp_shard_cp"), mesh.expert_mesh.get_group("ep"))

    @property
    def name(self) -> str:
        """What DeepSpeed calls these groups; it reads the number out of it."""
        return f"ep_size_{self.every.size()}"


def register(dealt: Dealt) -> None:
    """Tell DeepSpeed these groups by their name. Engines that are there already keep theirs."""
    from deepspeed.utils import groups

    groups._EXPERT_PARALLEL_GROUP[dealt.name] = dealt.every
    groups._EXPERT_PARALLEL_GROUP_RANKS[dealt.name] = get_process_group_ranks(dealt.every)
    groups._EXPERT_DATA_PARALLEL_GROUP[dealt.name] = dealt.same
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[dealt.name] = get_process_group_ranks(dealt.same)


def mark(part: nn.Module, dealt: Dealt, stage: int) -> None:
    """Tell DeepSpeed which parameters of `part` are experts'; before it has seen them.

    Stages 1 and 2 go by one set of attributes, stage 3 by another.
    """
    for parameter in _parameters(part):
        told: Any = parameter
        if stage < 3:
            told.allreduce, told.group_name = False, dealt.name
        else:
            told.ds_zero_placement_family = "autoep_expert"
            told.ds_zero_partition_group_name = dealt.name
            told.ds_zero_partition_process_group = dealt.same


def apart(groups: Iterable[Group], model: nn.Module) -> list[Group]:
    """The optimizer's groups with experts in groups of their own, behind those they came from."""
    experts = _ids(model)
    made = []
    for group in groups:
        for are_experts in (False, True):
            chosen = {
                name: parameter
                for name, parameter in group.parameters.items()
                if (id(parameter) in experts) == are_experts
            }
            if chosen:
                made.append(replace(group, parameters=chosen))
    return made


def name_groups(torch_groups: Sequence[dict[str, Any]], model: nn.Module, dealt: Dealt) -> None:
    """Say which of torch's groups are experts'."""
    experts = _ids(model)
    for group in torch_groups:
        if id(group["params"][0]) in experts:
            group.update(moe=True, name=dealt.name)


def shells_of(model: nn.Module, group: ProcessGroup | None, dealt: Dealt | None) -> list[Shells]:
    """Layouts of a model from the native engine, those of experts by themselves."""
    every = Shells.of(model, group)
    if dealt is None:
        return [every]
    experts = _ids(model)
    names = {name for name, parameter in model.named_parameters() if id(parameter) in experts}
    rest = {name: shell for name, shell in every if name not in names}
    made = {name: _dealt_shell(shell, dealt) for name, shell in every if name in names}
    return [Shells(rest, group), Shells(made, dealt.same)]


def _dealt_shell(shell: Shell, dealt: Dealt) -> Shell:
    """The shell with spans of what one rank of the ep axis has: an equal number of experts."""
    here = (shell.tp_shape[0] // dealt.every.size(), *shell.tp_shape[1:])
    return replace(shell, spans=tuple(row_spans(here, dealt.same.size())))


def gather_in_one_order(parameters: Iterable[nn.Parameter]) -> None:
    """Let stage 3 begin gathers of several groups in the same order on every rank.

    It hands sets of parameters around, whose order is that of their addresses, and gathers group
    by group as it meets them. Where kernels of several groups wait for room on a device, ranks that
    begin them in different orders can wait for each other.
    """
    for parameter in parameters:
        told: Any = parameter
        told.all_gather_coalesced = _in_order(told.all_gather_coalesced)


def _in_order(gather: Callable[..., Any]) -> Callable[..., Any]:
    def ordered(parameters: Iterable[Any], **settings: Any) -> Any:
        return gather(sorted(parameters, key=lambda one: one.ds_id), **settings)

    return ordered


def _ids(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in _parameters(model)}


def _parameters(part: nn.Module) -> Iterator[Tensor]:
    for layer in moe_layers(part).values():
        yield from layer.experts.parameters()
