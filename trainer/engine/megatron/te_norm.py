"""Norms with weights, and what turns queries and keys, by TransformerEngine's kernels: CUDA alone.

Two kernels, by their documented interface, in the place of the half a dozen that torch runs one by
one. Norms without weights, which noise levels scale, stay: the library's would bring weights.

Shape legend: N tokens, H heads, D head dim, P = D / 2 pairs.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from kinodit.models.norm import RMSNorm
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.te import library


class Angles:
    """Angles of tables of cosines and sines, made once for each table: all blocks get the same."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def of(self, rotary: Tensor) -> Tensor:
        """`rotary` [N, P, 2] -> [N, 1, 1, D] float32, each angle for both channels of its pair."""
        if rotary not in self._known:
            cosine, sine = rotary.unbind(-1)
            angle = torch.atan2(sine, cosine).to(torch.float32)
            self._known[rotary] = torch.stack((angle, angle), dim=-1).view(len(rotary), 1, 1, -1)
        found: Tensor = self._known[rotary]
        return found


def te_norm(norm: RMSNorm, angles: Angles) -> nn.Module:
    """A norm of TransformerEngine with the weight of `norm`, which also turns queries and keys."""
    kind = library().RMSNorm
    rope = importlib.import_module("transformer_engine.pytorch.attention.rope")

    def forward(self: nn.Module, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """`x` [N, ..., D] -> the same; with `rotary` [N, P, 2], cosines and sines, [N, H, D]."""
        normed: Tensor = kind.forward(self, x)
        if rotary is None or len(x) == 0:
            return normed
        # One sequence, in which every token has angles of its own.
        turned: Any = rope.apply_rotary_pos_emb(
            normed.unsqueeze(1),
            angles.of(rotary),
            tensor_format="sbhd",
            interleaved=True,
            fused=True,
        )
        return cast(Tensor, turned.squeeze(1))

    rotating = type(f"Rotating{kind.__name__}", (kind,), {"forward": forward})
    made: nn.Module = rotating(
        norm.weight.shape[0], eps=norm.eps, dtype=norm.weight.dtype, device="meta"
    )
    made.register_parameter("weight", norm.weight)
    return made


def use_norms(model: nn.Module, engine: MegatronConfig) -> None:
    """Let the library norm for a model that is not laid out, if asked to."""
    if engine.norms != "transformer_engine":
        return
    angles = Angles()
    for name, module in list(model.named_modules()):
        if isinstance(module, RMSNorm):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, te_norm(module, angles))
