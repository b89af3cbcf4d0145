"""From a model on the meta device to the engine that drives it."""

from __future__ import annotations

from typing import Any

from torch import nn

from kinodit.models.mmdit import MMDiT
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.engine.base import Predictions
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.te import float8_context
from kinodit.trainer.engine.megatron.te_attention import fused
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.optim import build_optimizer
from kinodit.trainer.parallel.apply import parallelize
from kinodit.trainer.parallel.deferred import Values, materialize
from kinodit.trainer.parallel.mesh import Mesh


class MegatronEngine(NativeEngine):
    """The native engine over linears and process groups of megatron-core."""

    def __init__(self, *parts: Any, wish: Wish) -> None:
        super().__init__(*parts)
        self._computing = float8_context(wish.precision.float8)

    def _forward(self, batch: TokenBatch) -> Predictions:
        with self._computing():
            return super()._forward(batch)


def build(model: nn.Module, values: Values, mesh: Mesh, wish: Wish) -> MegatronEngine:
    """See `build_engine`: linears are megatron-core's already, parameters become FSDP2's.

    `mesh` is that of `build_mesh` of this package, whose groups are megatron-core's.
    """
    assert isinstance(wish.engine, MegatronConfig)
    parallelize(model, mesh, wish.parallel, wish.precision, wish.remat, compile_blocks=False)
    if wish.engine.attention == "transformer_engine":
        assert isinstance(model, MMDiT)
        model.attend = fused(model.attend)
    materialize(model, values, mesh.device, cpu_offload=wish.parallel.cpu_offload)
    optimizer = build_optimizer(wish.optim, model)
    return MegatronEngine(model, optimizer, mesh, wish.precision, wish=wish)
