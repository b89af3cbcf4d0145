"""The native engine: plain torch in one process, FSDP2 on several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinodit.models.tokens import TokenBatch
from kinodit.trainer.engine.base import Forward, Predictions
from kinodit.trainer.optim import Optimizer
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.shard import reshard, set_gradient_sync


class NativeEngine:
    """Implements `Engine` for a model that `parallelize` has prepared.

    A run in bfloat16 on one process computes under autocast, since nothing gathers (and thereby
    casts) its parameters.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, mesh: Mesh, precision: PrecisionConfig
    ) -> None:
        self.model = model
        self.device = mesh.device
        self._optimizer = optimizer
        self._mesh = mesh
        self._dtype = precision.compute_dtype
        self._autocast = mesh.device_mesh is None and (
            precision.compute_dtype != precision.params_dtype
        )

    def forward_backward(
        self, batch: TokenBatch, loss: Callable[[Predictions], Tensor], *, last: bool
    ) -> Tensor:
        """See `Engine`."""
        set_gradient_sync(self.model, last)
        value = loss(self._forward(batch))
        value.backward()
        return value.detach()

    def clip(self, max_norm: float) -> Tensor:
        """See `Engine`."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        return norm

    def step(self, lr: float) -> None:
        """See `Engine`."""
        self._optimizer.set_lr(lr)
        self._optimizer.step()

    @contextmanager
    def inference(self) -> Iterator[Forward]:
        """See `Engine`."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield self._forward
        finally:
            reshard(self.model)
            self.model.train()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            yield name, gradient.full_tensor() if isinstance(gradient, DTensor) else gradient

    def state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        tensors = {f"model/{name}": p.detach() for name, p in self.model.named_parameters()}
        tensors |= {f"optim/{name}": tensor for name, tensor in self._optimizer.state().items()}
        return tensors

    def set_num_steps(self, num_steps: int) -> None:
        """See `Engine`."""
        self._optimizer.set_num_steps(num_steps)

    def _forward(self, batch: TokenBatch) -> Predictions:
        latents = {
            name: tokens.latents.to(self._dtype) for name, tokens in batch.modalities.items()
        }
        conditions = {name: vector.to(self._dtype) for name, vector in batch.conditions.items()}
        batch = replace(batch.with_latents(latents), conditions=conditions)
        with torch.autocast(self.device.type, self._dtype, enabled=self._autocast):
            predictions: Predictions = self.model(batch)
        return predictions
