"""What ZeRO keeps on a rank: flat tensors, and which stretch of which parameter lies where.

The names of DeepSpeed's attributes are its own business and move with its versions; whatever this
project reads of them is read here, but `ds_shape`, which `trainer/optim/base.py` groups by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinodit.trainer.engine.deepspeed.files import Files
from kinodit.trainer.engine.partitioned import Place
from kinodit.trainer.engine.spans import overlap


def group_key(index: int) -> str:
    """Name of a flat tensor."""
    return f"partition{index}"


class _Flats:
    """What the stages have in common. names: of the attributes that stages call otherwise."""

    masters_name: str
    offloads_name: str

    def __init__(self, optimizer: Any) -> None:
        self._zero = optimizer
        self.places: dict[str, Place] = {}

    @property
    def offloads(self) -> bool:
        """Whether gradients and updates are on the host."""
        return bool(getattr(self._zero, self.offloads_name))

    def masters(self) -> dict[str, Tensor]:
        """See `Partitions`."""
        flats = getattr(self._zero, self.masters_name)
        return {group_key(index): flat for index, flat in enumerate(flats)}

    def gradients(self) -> dict[str, Tensor]:
        """See `Partitions`."""
        flats: dict[str, Tensor] = {}
        averaged = self._zero.averaged_gradients
        for index, (key, master) in enumerate(self.masters().items()):
            if self.offloads:
                assert master.grad is not None, "no backward yet"
                flats[key] = master.grad
                continue
            parts = averaged[index]
            if len(parts) != 1 or parts[0].numel() != master.numel():
                missing = master.numel() - sum(part.numel() for part in parts)
                padding = master.new_zeros(missing)
                averaged[index] = [torch.cat([*(part.reshape(-1) for part in parts), padding])]
            flats[key] = averaged[index][0].view(-1)
        return flats

    def put_in(self, files: Files) -> None:
        """Move masters and gradients, which are on the host, into files."""
        assert self.offloads, "they are on the device"
        for master in self.masters().values():
            master.data = files.copy(master.data)
            if master.grad is not None:
                master.grad = files.copy(master.grad)


class SplitGroups(_Flats):
    """Stages 1 and 2: each group of parameters is one flat tensor, cut into equal partitions."""

    masters_name, offloads_name = "single_partition_of_fp32_groups", "cpu_offload"

    def __init__(self, optimizer: Any, names: Mapping[int, str]) -> None:
        super().__init__(optimizer)
        for index, group in enumerate(optimizer.round_robin_bit16_groups):
            over = optimizer.real_dp_process_group[index]
            num_ranks, rank = dist.get_world_size(over), dist.get_rank(over)
            size = int(optimizer.partition_size[index])
            offsets = optimizer.round_robin_bit16_offsets[index]
            for parameter, offset in zip(group, offsets, strict=True):
                numel = parameter.numel()
                spans = []
                for owner in range(num_ranks):
                    start, stop = overlap(
                        (offset, offset + numel), (owner * size, (owner + 1) * size)
                    )
                    spans.append((start - offset, stop - offset) if stop > start else (0, 0))
                inside = max(0, offset - rank * size) if spans[rank][1] else 0
                self.places[names[id(parameter)]] = Place(
                    group_key(index), inside, spans[rank], tuple(spans)
                )

    def put_in(self, files: Files) -> None:
        """See `_Flats`."""
        super().put_in(files)
        # Parameters have views of masters, which would keep the memory.
        self._zero._link_all_hp_params()

    def drop_gradients(self) -> None:
        """See `Partitions`."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        if self.offloads:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()
        for index in range(len(zero.bit16_groups)):
            zero.averaged_gradients[index] = None
            zero.all_grad_tensors[index] = None
        zero.micro_step_id = -1

    def refresh(self) -> None:
        """See `Partitions`."""
        self._zero.update_lp_params()


class SplitParameters(_Flats):
    """Stage 3: each parameter is cut into equal partitions, which lie behind each other."""

    masters_name, offloads_name = "fp32_partitioned_groups_flat", "offload_optimizer"

    def __init__(self, optimizer: Any, names: Mapping[int, str]) -> None:
        super().__init__(optimizer)
        for index, group in enumerate(optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                size, numel = int(parameter.partition_numel()), int(parameter.ds_numel)
                spans = tuple(
                    (min(owner * size, numel), min((owner + 1) * size, numel))
                    for owner in range(parameter.ds_zero_partition_world_size)
                )
                own = spans[parameter.ds_zero_partition_rank]
                self.places[names[id(parameter)]] = Place(group_key(index), offset, own, spans)
                offset += size

    def put_parameters_in(self, files: Files) -> None:
        """Move the partitions of parameters, which are on the host, into files."""
        zero = self._zero
        zero._partition_all_parameters()
        for index, flat in enumerate(zero.fp16_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[index] = files.copy(flat)
            zero._unflatten_partitioned_parameters(index)
        zero.param_groups_fp16_flat_cpu_memory = []

    def drop_gradients(self) -> None:
        """See `Partitions`."""
        zero = self._zero
        zero._partition_all_parameters()
        zero.zero_grad(set_to_none=True)
        if self.offloads:
            zero.reset_cpu_buffers()
        zero.averaged_gradients = {}
        zero.micro_step_id = 0

    def refresh(self) -> None:
        """See `Partitions`."""
        zero = self._zero
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()


def partitions_of(engine: Any, model: nn.Module) -> SplitGroups | SplitParameters:
    """What a `DeepSpeedEngine` around `model` keeps on this rank."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stage = SplitParameters if engine.zero_optimization_stage() == 3 else SplitGroups
    return stage(engine.optimizer, names)
