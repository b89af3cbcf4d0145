"""Linears of TransformerEngine, and its float8: CUDA alone, by its documented interface.

They hold a rank's part and compute the product; what crosses between ranks is ours, as with
megatron-core's linears, so `parallel_mode` stays None and TransformerEngine never communicates.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

MULTIPLE = 16
"""Rows of a product in float8 come in multiples of this."""


def library() -> Any:
    """`transformer_engine.pytorch`; where it is missing, a recipe that needs it was refused."""
    return importlib.import_module("transformer_engine.pytorch")


def te_linear(linear: nn.Linear, in_features: int, out_features: int) -> nn.Module:
    """A TransformerEngine linear with the weights of `linear`, whole.

    in_features, out_features: of this rank's part, as the product will see it
    """
    kind = library().Linear

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        num_rows = flat.shape[0]
        filling = flat.new_zeros(-num_rows % MULTIPLE, flat.shape[1])
        padded = torch.cat((flat, filling)) if len(filling) else flat
        out: Tensor = kind.forward(self, padded).narrow(0, 0, num_rows)
        return out.view(*x.shape[:-1], out.shape[-1])

    padding = type(f"Padding{kind.__name__}", (kind,), {"forward": forward})
    made: nn.Module = padding(
        in_features,
        out_features,
        bias=linear.bias is not None,
        params_dtype=linear.weight.dtype,
        parallel_mode=None,
        device="meta",
    )
    made.register_parameter("weight", cast(nn.Parameter, linear.weight))
    if linear.bias is not None:
        made.register_parameter("bias", linear.bias)
    return made


def float8_context(
    float8: Literal["none", "tensorwise", "rowwise"],
) -> Callable[[], AbstractContextManager[Any]]:
    """What a forward runs in: products in float8, scaled by each tensor's current maximum."""
    if float8 == "none":
        return nullcontext
    assert float8 == "tensorwise", "refused before"
    recipe = importlib.import_module("transformer_engine.common.recipe").Float8CurrentScaling()
    return lambda: library().autocast(enabled=True, recipe=recipe)
