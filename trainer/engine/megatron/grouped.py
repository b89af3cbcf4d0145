"""Products of experts by the grouped GEMM that megatron-core uses: CUDA alone, by its interface.

It takes rows sorted by expert and how many there are of each, counted on the host: the host waits
for the device once for each layer, which torch's own grouped product need not.

Shape legend: E experts, R rows, d width, i and o inputs and outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinodit.models.mlp import activated
from kinodit.models.modulation import per_token
from kinodit.models.moe.experts import Experts, Read
from kinodit.models.moe.layer import moe_layers
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.core import grouped_gemm_util


class GroupedExperts(Experts):
    """`Experts` whose products are the library's."""

    def forward(self, x: Tensor, counts: Tensor, read: Read | None = None) -> Any:
        """See `Experts`."""
        if read is not None:
            return read(self)
        on_host = counts.cpu()

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return _linear(x, weight, bias, counts, on_host)

        hidden = linear(x, self.up, self.up_bias)
        if self.gate is None:
            hidden = activated(hidden, self.activation)
        else:
            hidden = F.silu(linear(x, self.gate, self.gate_bias)) * hidden
        return linear(hidden, self.down, self.down_bias)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, on_host: Tensor
) -> Tensor:
    """`x` [R, i], `weight` [E, o, i], `bias` [E, o], `counts` [E] -> [R, o]."""
    out: Tensor = grouped_gemm_util.ops.gmm(x.contiguous(), weight, on_host, trans_b=True)
    if bias is None:
        return out
    return out + per_token(bias, torch.repeat_interleave(counts, output_size=len(out)))


def use_grouped_gemm(model: nn.Module, engine: MegatronConfig) -> None:
    """Let the library multiply for the experts of a model that is not laid out, if asked to."""
    if engine.experts == "grouped_gemm":
        for layer in moe_layers(model).values():
            layer.experts.__class__ = GroupedExperts
