"""Every linear of the table of shardings as one of megatron-core's.

The classes hold the weights and compute the product; what crosses between ranks is ours, at the
seams of the model, all streams in one message (`trainer/parallel/tensor.py`). So that is the same
on gloo, where megatron-core's own sequence parallelism cannot run, and exact. Parameters keep their
names and become DTensors as in the native engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kinodit.trainer.engine.megatron.core import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from kinodit.trainer.engine.megatron.te import te_linear
from kinodit.trainer.parallel.float8 import MATRICES
from kinodit.trainer.parallel.table import Row, Style

COLUMNS: tuple[Style, ...] = ("column", "stored")
"""Styles that split outputs; the others split inputs."""


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Outputs split: what it reads as `weight` is this rank's part, or the whole put together."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., inputs] -> [..., outputs here]."""
        return _product(self, x)


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """Inputs split: gives a part of a sum, which the model's seam adds up."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., inputs here] -> [..., outputs]."""
        return _product(self, x)


def swap_linears(
    model: nn.Module,
    rows: Sequence[Row],
    tp_group: ProcessGroup | None,
    num_ranks: int,
    *,
    use_te: bool = False,
) -> None:
    """Replace linears that the table names, in place. Weights stay, whole, where they are.

    The tables of models are strict, so that what is left are no linears of theirs. use_te: those
    whose forward sees a part, which are the large ones, become TransformerEngine's.
    """
    config = ModelParallelConfig(
        tensor_model_parallel_size=num_ranks,
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    for name, module in list(model.named_modules()):
        row = next((row for row in rows if row.matches(name)), None)
        if row is None or not isinstance(module, nn.Linear):
            continue
        if use_te and row.style in ("column", "row") and is_multiplied(name):
            made = te_linear(module, *part_sizes(module, row.style, num_ranks))
        else:
            made = _swapped(module, row.style, config, tp_group)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)


def part_sizes(linear: nn.Linear, style: Style, num_ranks: int) -> tuple[int, int]:
    """(inputs, outputs) of one rank's part of a product."""
    split = linear.out_features if style == "column" else linear.in_features
    part = split // num_ranks
    return (linear.in_features, part) if style == "column" else (part, linear.out_features)


def is_multiplied(name: str) -> bool:
    """Whether a linear is one of a block's large matrices."""
    return MATRICES.match(name) is not None


def _swapped(
    linear: nn.Linear, style: Style, config: ModelParallelConfig, tp_group: ProcessGroup | None
) -> nn.Module:
    shared: dict[str, Any] = {
        "config": config,
        "init_method": lambda weight: weight,
        "bias": linear.bias is not None,
        "tp_group": tp_group,
    }
    sizes = linear.in_features, linear.out_features
    with torch.device("meta"):
        made = (
            ColumnLinear(*sizes, disable_grad_reduce=True, **shared)
            if style in COLUMNS
            else RowLinear(*sizes, input_is_parallel=True, skip_bias_add=True, **shared)
        )
    # Nothing here talks, and a process group cannot be copied with a model.
    made.tp_group = None
    # It was made for its part: it gets the whole, which `split_model` splits by the table.
    made.weight = linear.weight
    if linear.bias is not None:
        made.bias = linear.bias
    return cast(nn.Module, made)


def _product(linear: Any, x: Tensor) -> Tensor:
    weight, bias = linear.weight, linear.bias
    if torch.is_autocast_enabled(x.device.type):
        # megatron-core's backward runs outside of autocast, on what its forward was given.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    flat = x.reshape(-1, x.shape[-1])
    compute = (
        linear_with_grad_accumulation_and_async_allreduce
        if weight.requires_grad
        else linear_with_frozen_weight
    )
    out: Tensor = compute(
        flat,
        weight,
        bias,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=None,
    )
    return out.view(*x.shape[:-1], out.shape[-1])
