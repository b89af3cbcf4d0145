"""Weights for a model that was laid out before it had any: each rank makes its own part.

A model of tens of billions of parameters does not fit where its shards do. It is built on the meta
device, split and sharded there, and only then given memory. What a parameter starts from is a pure
function of its name, so every layout starts from the same weights, bit for bit. (Left to DTensor's
random numbers, every rank of a CPU mesh would draw the same shard.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinodit.models.init import initial_value
from kinodit.trainer.parallel.parts import cut_part

Values = Callable[[str, Sequence[int]], Tensor]
"""(parameter name, whole shape) -> the whole value, on the host."""


def initial_values(seed: int) -> Values:
    """What `initialize` gives to a model."""
    return lambda name, shape: initial_value(name, shape, seed)


@torch.no_grad()
def materialize(
    model: nn.Module, values: Values, device: torch.device, *, cpu_offload: bool = False
) -> None:
    """Give every parameter and buffer of `model` memory and its value, in place.

    The memory is on `device`, or on the host where FSDP2 brings parameters to the device. One whole
    parameter at a time is made on the host. Buffers are small, on `device`, and the same on every
    rank. Raises LookupError for what `values` knows no value for.
    """
    model.to_empty(device="cpu" if cpu_offload else device)
    for name, parameter in model.named_parameters():
        value = values(name, parameter.shape)
        if isinstance(parameter, DTensor):
            own = parameter.to_local()
            own.copy_(part_of(value, parameter))
        else:
            parameter.copy_(value)
    for path, module in model.named_modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            value = values(f"{path}.{key}" if path else key, buffer.shape)
            module.register_buffer(key, value.to(device, buffer.dtype))


def part_of(value: Tensor, like: DTensor) -> Tensor:
    """The part of a whole `value` that this rank holds of `like`."""
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None, "a rank outside the mesh of its parameter"
    return cut_part(value, like, coordinate)
