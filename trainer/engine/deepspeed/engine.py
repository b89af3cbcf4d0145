"""Training steps under ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinodit.models.moe.layer import moe_layers
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.engine.base import Forward, Predictions
from kinodit.trainer.engine.deepspeed.partitions import Partitions
from kinodit.trainer.engine.shells import Shells
from kinodit.trainer.engine.spans import redistribute
from kinodit.trainer.optim.adamw import AdamW
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.deferred import Values
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.sharing import SharedForward
from kinodit.trainer.parallel.tensor import sum_parts

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """Implements `Engine` by a DeepSpeedEngine.

    DeepSpeed computes, reduces, updates and gathers. Norm and clipping are done here, between its
    reduction and its update, so that they are those of every other engine.
    """

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        optimizer: AdamW,
        partitions: Partitions,
        shells: Shells,
        mesh: Mesh,
        precision: PrecisionConfig,
    ) -> None:
        """engine: the DeepSpeedEngine around `model` and the client optimizer in `optimizer`."""
        self.model = model
        self.device = mesh.device
        self._engine = engine
        self._optimizer = optimizer
        self._partitions = partitions
        self._shells = shells
        self._buffers = dict(model.named_buffers())
        self._mesh = mesh
        self._dtype = precision.compute_dtype
        self._shared = SharedForward(self._forward, mesh) if mesh.place.is_cut else self._forward
        is_averaged = engine.zero_optimization_stage() == 3
        num_ranks = 1 if shells.group is None else shells.group.size()
        # Stage 3 divides by the number of ranks and cannot be told not to.
        self._loss_scale = float(num_ranks) if is_averaged else 1.0
        for layer in moe_layers(model).values():
            layer.gradient_scale = self._loss_scale

    def start_from(self, values: Values) -> None:
        """Set the masters to `values`, one whole parameter at a time. Collective."""
        flats = self._partitions.masters()
        for name, shell in self._shells:
            made = values(name, shell.shape)
            if shell.spec is not None and not shell.on_every_tp_rank:
                made = _along_tp(made, shell.tp_shape, self._mesh)
            place = self._partitions.places[name]
            with torch.no_grad():
                place.view(flats).copy_(made.reshape(-1)[slice(*place.own)])
        for name, buffer in self._buffers.items():
            buffer.copy_(values(name, buffer.shape))
        self.set_num_steps(0)
        self.refresh()

    @property
    def num_parameters(self) -> int:
        """See `Engine`."""
        return self._shells.num_parameters

    def forward_backward(
        self, batch: TokenBatch, loss: Callable[[Predictions], Tensor], *, last: bool
    ) -> Tensor:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(last)
        value = loss(self._forward(batch))
        self._engine.backward(value * self._loss_scale, scale_wrt_gas=False)
        if last and self._mesh.tp_mesh is not None:
            self._sum_whole_gradients()
        return value.detach()

    def clip(self, max_norm: float) -> Tensor:
        """See `Engine`."""
        norm = self._mesh.sum(self.gradient_squares(list(self._partitions.places)).sum()).sqrt()
        if max_norm > 0:
            scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for flat in self._partitions.gradients().values():
                flat.mul_(scale.to(flat))
        return norm

    def step(self, lr: float) -> None:
        """See `Engine`."""
        self._optimizer.set_lr(lr)
        self._engine.step()

    def skip(self) -> None:
        """See `Engine`."""
        self._partitions.drop_gradients()

    @contextmanager
    def inference(self) -> Iterator[Forward]:
        """See `Engine`."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield self._shared
        finally:
            self._engine.train()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        for name, part in self.canonical(self._partitions.gradients()).items():
            yield name, part.full_tensor() if isinstance(part, DTensor) else part

    def gradient_parts(self) -> dict[str, Tensor]:
        """See `Engine`."""
        flats = self._partitions.gradients()
        return {name: place.view(flats) for name, place in self._partitions.places.items()}

    def gradient_squares(self, names: Sequence[str]) -> Tensor:
        """See `Engine`."""
        parts = self.gradient_parts()
        norms = torch._foreach_norm([parts[name] for name in names], dtype=torch.float64)
        num_tp = 1 if self._mesh.tp_mesh is None else self._mesh.tp_mesh.size()
        shells = (self._shells.by_name[name] for name in names)
        copies = [num_tp if shell.on_every_tp_rank else 1 for shell in shells]
        # What is offloaded to the host still crosses between devices.
        squares = torch.stack(norms).to(self.device).square()
        return squares / self._mesh.tensor(copies, torch.float64)

    def masters(self) -> dict[str, Tensor]:
        """See `Engine`: flat partitions, with the padding at their ends; buffers by name."""
        return {**self._partitions.masters(), **self._buffers}

    def refresh(self) -> None:
        """See `Engine`."""
        self._partitions.refresh()

    def canonical(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Engine`: copies, on the host, but for buffers."""
        places = self._partitions.places
        parts = {name: places[name].view(values).detach() for name, _ in self._shells}
        made = self._shells.empty(next(iter(values.values())))
        have = {name: places[name].spans for name, _ in self._shells}
        redistribute(parts, have, made, self._shells.spans(), self._shells.group)
        found = {name: shell.wrap(made[name]) for name, shell in self._shells}
        return found | {name: values[name] for name in self._buffers if name in values}

    def assign(self, values: Mapping[str, Tensor], canonical: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        places = self._partitions.places
        parts = {name: _flat(canonical[name]) for name, _ in self._shells}
        wanted = {name: places[name].view(values).detach() for name, _ in self._shells}
        want = {name: places[name].spans for name, _ in self._shells}
        redistribute(parts, self._shells.spans(), wanted, want, self._shells.group)
        for name in self._buffers:
            if name in values:
                values[name].copy_(canonical[name])

    def state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        tensors = {f"model/{name}": x for name, x in self.canonical(self.masters()).items()}
        for moment in MOMENTS:
            found = self.canonical(self._moments(moment))
            tensors |= {f"optim/{moment}/{name}": x for name, x in found.items()}
        return tensors

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        self.assign(self.masters(), _under("model/", state))
        for moment in MOMENTS:
            self.assign(self._moments(moment), _under(f"optim/{moment}/", state))
        self.refresh()

    def set_num_steps(self, num_steps: int) -> None:
        """See `Engine`."""
        for master in self._partitions.masters().values():
            self._optimizer.initialised(master)["step"].fill_(float(num_steps))

    def _moments(self, moment: str) -> dict[str, Tensor]:
        masters = self._partitions.masters().items()
        return {key: self._optimizer.initialised(master)[moment] for key, master in masters}

    @torch.no_grad()
    def _sum_whole_gradients(self) -> None:
        """As `sum_whole_gradients`, after ZeRO's reduction: of this rank's stretches alone."""
        assert self._mesh.tp_mesh is not None
        parts = [
            part
            for name, part in self.gradient_parts().items()
            if self._shells.by_name[name].on_every_tp_rank
        ]
        sum_parts(parts, self._mesh.tp_mesh, self.device)

    def _forward(self, batch: TokenBatch) -> Predictions:
        batch = batch.in_dtype(self._dtype)
        predictions: Predictions = self._engine(batch)
        return predictions


def _flat(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.reshape(-1)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _along_tp(value: Tensor, tp_shape: tuple[int, ...], mesh: Mesh) -> Tensor:
    """A tp rank's part of a whole value."""
    for dim, (whole, part) in enumerate(zip(value.shape, tp_shape, strict=True)):
        if part < whole:
            return value.narrow(dim, mesh.place.tp_index * part, part)
    return value
