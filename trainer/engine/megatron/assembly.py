"""From a model on the meta device to the engine that drives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kinodit.models.tokens import TokenBatch
from kinodit.trainer.engine.base import Engine, Predictions
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron import distributed
from kinodit.trainer.engine.megatron.dispatch import use_dispatcher
from kinodit.trainer.engine.megatron.elsewhere import without_streams
from kinodit.trainer.engine.megatron.grouped import use_grouped_gemm
from kinodit.trainer.engine.megatron.te import float8_context
from kinodit.trainer.engine.megatron.te_attention import use_kernels
from kinodit.trainer.engine.megatron.te_norm import use_norms
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

    def forward_backward(
        self, batch: TokenBatch, loss: Callable[[Predictions], Tensor], *, last: bool
    ) -> Tensor:
        """See `Engine`."""
        with without_streams(self.device):
            return super().forward_backward(batch, loss, last=last)

    def _forward(self, batch: TokenBatch) -> Predictions:
        with self._computing(), without_streams(self.device):
            return super()._forward(batch)


def build(model: nn.Module, values: Values, mesh: Mesh, wish: Wish) -> Engine:
    """See `build_engine`: linears are megatron-core's already.

    `mesh` is that of `build_mesh` of this package, whose groups are megatron-core's. Parameters
    become FSDP2's, or its own where it is asked for and there are ranks to share with.
    """
    assert isinstance(wish.engine, MegatronConfig)
    use_grouped_gemm(model, wish.engine)
    use_norms(model, wish.engine)
    if wish.engine.data_parallel == "distributed_optimizer" and mesh.device_mesh is not None:
        return distributed.build(model, values, mesh, wish)
    parallelize(model, mesh, wish.parallel, wish.precision, wish.remat, compile_blocks=False)
    use_kernels(model, wish.engine)
    use_dispatcher(model, mesh, wish.engine)
    materialize(model, values, mesh.device, cpu_offload=wish.parallel.cpu_offload)
    optimizer = build_optimizer(wish.optim, model)
    return MegatronEngine(model, optimizer, mesh, wish.precision, wish=wish)
