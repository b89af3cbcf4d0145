"""Training steps under ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kinodit.models.moe.layer import moe_layers
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.engine.base import Forward, Predictions
from kinodit.trainer.engine.evaluating import evaluating
from kinodit.trainer.engine.partitioned import PartitionedEngine, Partitions
from kinodit.trainer.engine.shells import Shells
from kinodit.trainer.optim.adamw import AdamW
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.sharing import SharedForward


class ZeroEngine(PartitionedEngine):
    """Implements `Engine` by a DeepSpeedEngine, which computes, reduces, updates and gathers."""

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        optimizer: AdamW,
        partitions: Partitions,
        shells: Sequence[Shells],
        mesh: Mesh,
        precision: PrecisionConfig,
    ) -> None:
        """engine: the DeepSpeedEngine around `model` and the client optimizer in `optimizer`."""
        super().__init__(model, optimizer, partitions, shells, mesh)
        self._engine = engine
        self._dtype = precision.compute_dtype
        self._shared = SharedForward(self._forward, mesh) if mesh.place.is_cut else self._forward
        is_averaged = engine.zero_optimization_stage() == 3
        group = shells[0].group
        num_ranks = 1 if group is None else group.size()
        # Stage 3 divides by the number of ranks and cannot be told not to.
        self._loss_scale = float(num_ranks) if is_averaged else 1.0
        for layer in moe_layers(model).values():
            layer.gradient_scale = self._loss_scale

    def forward_backward(
        self, batch: TokenBatch, loss: Callable[[Predictions], Tensor], *, last: bool
    ) -> Tensor:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(last)
        value = loss(self._forward(batch))
        self._engine.backward(value * self._loss_scale, scale_wrt_gas=False)
        if last:
            self._sum_whole_gradients()
        return value.detach()

    def step(self, lr: float) -> None:
        """See `Engine`."""
        self._optimizer.set_lr(lr)
        self._engine.step()

    @contextmanager
    def inference(self) -> Iterator[Forward]:
        """See `Engine`."""
        with evaluating(self._engine):
            yield self._shared

    def _forward(self, batch: TokenBatch) -> Predictions:
        batch = batch.in_dtype(self._dtype)
        predictions: Predictions = self._engine(batch)
        return predictions
