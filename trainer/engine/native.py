"""The native engine: plain torch in one process, FSDP2 on several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kinodit.models.tokens import TokenBatch
from kinodit.trainer.engine.base import Forward, Predictions
from kinodit.trainer.engine.evaluating import evaluating
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.optim import Optimizer, build_optimizer
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.deferred import Values, materialize
from kinodit.trainer.parallel.float8 import use_float8
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.parts import local_part, spread, whole
from kinodit.trainer.parallel.shard import (
    global_norm,
    reshard,
    set_gradient_sync,
    squared_norms,
)
from kinodit.trainer.parallel.sharing import SharedForward
from kinodit.trainer.parallel.tensor import sum_whole_gradients


def build(model: nn.Module, values: Values, mesh: Mesh, wish: Wish) -> NativeEngine:
    """See `build_engine`."""
    use_float8(model, wish.precision, wish.parallel.tp)
    parallelize(
        model, mesh, wish.parallel, wish.precision, wish.remat, compile_blocks=wish.engine.compile
    )
    materialize(model, values, mesh.device, cpu_offload=wish.parallel.cpu_offload)
    return NativeEngine(model, build_optimizer(wish.optim, model), mesh, wish.precision)


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
        self._masters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._optimizer = optimizer
        self._mesh = mesh
        self._shared = SharedForward(self._forward, mesh) if mesh.place.is_cut else self._forward
        self._dtype = precision.compute_dtype
        self._autocast = mesh.device_mesh is None and (
            precision.compute_dtype != precision.params_dtype
        )

    @property
    def num_parameters(self) -> int:
        """See `Engine`."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def forward_backward(
        self, batch: TokenBatch, loss: Callable[[Predictions], Tensor], *, last: bool
    ) -> Tensor:
        """See `Engine`."""
        set_gradient_sync(self.model, last)
        value = loss(self._forward(batch))
        value.backward()
        if last and self._mesh.tp_mesh is not None:
            sum_whole_gradients(self.model, self._mesh.tp_mesh, self.device)
        return value.detach()

    def clip(self, max_norm: float) -> Tensor:
        """See `Engine`."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        assert gradients, "no parameter has a gradient"
        norm = global_norm(gradients, self._mesh)
        if max_norm > 0:
            scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            parts = [local_part(gradient) for gradient in gradients]
            torch._foreach_mul_(parts, scale.to(parts[0].device))
        return norm

    def step(self, lr: float) -> None:
        """See `Engine`."""
        self._optimizer.set_lr(lr)
        self._optimizer.step()

    def skip(self) -> None:
        """See `Engine`."""
        self._optimizer.skip()

    @contextmanager
    def inference(self) -> Iterator[Forward]:
        """See `Engine`."""
        with evaluating(self.model):
            try:
                yield self._shared
            finally:
                reshard(self.model)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        for name, parameter in self.model.named_parameters():
            yield name, whole(_gradient(parameter))

    def gradient_parts(self) -> dict[str, Tensor]:
        """See `Engine`."""
        parameters = self.model.named_parameters()
        return {name: local_part(p.grad) for name, p in parameters if p.grad is not None}

    def gradient_squares(self, names: Sequence[str]) -> Tensor:
        """See `Engine`."""
        gradients = [_gradient(self.model.get_parameter(name)) for name in names]
        return squared_norms(gradients, self._mesh)

    def masters(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return self._masters

    def refresh(self) -> None:
        """See `Engine`: the model computes with these very tensors."""

    def canonical(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Engine`: they are what is asked for."""
        return dict(values)

    def assign(self, values: Mapping[str, Tensor], canonical: Mapping[str, Tensor]) -> None:
        """See `Engine`: what was written is there already."""
        assert all(canonical[name] is value for name, value in values.items()), "not these tensors"

    def state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        tensors = {f"model/{name}": p.detach() for name, p in self.masters().items()}
        tensors |= {f"optim/{name}": tensor for name, tensor in self._optimizer.state().items()}
        return tensors

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`: what was written is there already."""

    def set_num_steps(self, num_steps: int) -> None:
        """See `Engine`."""
        self._optimizer.set_num_steps(num_steps)

    def _forward(self, batch: TokenBatch) -> Predictions:
        batch = batch.in_dtype(self._dtype)
        with torch.autocast(self.device.type, self._dtype, enabled=self._autocast):
            predictions: Predictions = self.model(batch)
        return predictions


def _gradient(parameter: Tensor) -> Tensor:
    """Zero for a parameter that nothing depended on."""
    if parameter.grad is not None:
        return parameter.grad
    return spread(torch.zeros_like(local_part(parameter)), parameter)
