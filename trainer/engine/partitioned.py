"""Engines whose ranks keep stretches of flattened parameters, as ZeRO does.

A library computes, reduces, updates and gathers; which stretch of which parameter it left on this
rank is all that has to be known of it. Norm, clipping, averages and checkpoints follow from that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinodit.trainer.engine.shells import Shell, Shells
from kinodit.trainer.engine.spans import Span, redistribute
from kinodit.trainer.optim.adamw import AdamW
from kinodit.trainer.parallel.deferred import Values
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.parts import local_part, whole
from kinodit.trainer.parallel.tensor import sum_parts

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Place:
    """Where a parameter's stretch lies. group: key of the flat tensor; offset: in it, of `own`."""

    group: str
    offset: int
    own: Span
    spans: tuple[Span, ...]

    def view(self, flats: Mapping[str, Tensor]) -> Tensor:
        """The stretch in flat tensors like the masters."""
        return flats[self.group].narrow(0, self.offset, self.own[1] - self.own[0])


class Partitions(Protocol):
    """A library's flat tensors on this rank. places: of every parameter, by name."""

    places: dict[str, Place]

    def masters(self) -> dict[str, Tensor]:
        """Flat parameters in the optimizer's precision, by group; some may be empty."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Flat reduced gradients by group, after the last backward; in place of the library's."""
        ...

    def drop_gradients(self) -> None:
        """Forget them instead of a step."""
        ...

    def refresh(self) -> None:
        """Bring masters to the parameters that the model computes with. Collective."""
        ...


class PartitionedEngine:
    """What such engines have in common of `Engine`; the steps themselves are each library's.

    Norm and clipping are done between the library's reduction and its update, so that they are
    those of every other engine.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamW,
        partitions: Partitions,
        shells: Sequence[Shells],
        mesh: Mesh,
    ) -> None:
        """shells: of all parameters, by the ranks that each has its stretches on.

        Behind the first are those of experts that the mesh deals out.
        """
        self.model = model
        self.device = mesh.device
        self._optimizer = optimizer
        self._partitions = partitions
        self._shells = shells
        known = {name: shell for some in shells for name, shell in some}
        self._shell = {name: known[name] for name, _ in model.named_parameters()}
        self._dealt = {name for some in shells[1:] for name, _ in some}
        self._buffers = dict(model.named_buffers())
        self._mesh = mesh

    def start_from(self, values: Values) -> None:
        """Set the masters to `values`, one whole parameter at a time. Collective."""
        flats = self._partitions.masters()
        for name, shell in self._shell.items():
            made = values(name, shell.shape)
            if name in self._dealt:
                made = _own_experts(made, self._mesh)
            if shell.spec is not None and not shell.on_every_tp_rank:
                made = _along_tp(made, shell, self._mesh)
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
        return sum(some.num_parameters for some in self._shells)

    def clip(self, max_norm: float) -> Tensor:
        """See `Engine`."""
        norm = self._mesh.sum(self.gradient_squares(list(self._partitions.places)).sum()).sqrt()
        if max_norm > 0:
            scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            flats = list(self._partitions.gradients().values())
            torch._foreach_mul_(flats, scale.to(flats[0]))
        return norm

    def skip(self) -> None:
        """See `Engine`."""
        self._partitions.drop_gradients()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        for name, part in self.canonical(self._partitions.gradients()).items():
            yield name, whole(part)

    def gradient_parts(self) -> dict[str, Tensor]:
        """See `Engine`."""
        flats = self._partitions.gradients()
        return {name: place.view(flats) for name, place in self._partitions.places.items()}

    def gradient_squares(self, names: Sequence[str]) -> Tensor:
        """See `Engine`."""
        parts = self.gradient_parts()
        norms = torch._foreach_norm([parts[name] for name in names], dtype=torch.float64)
        num_tp = 1 if self._mesh.tp_mesh is None else self._mesh.tp_mesh.size()
        shells = (self._shell[name] for name in names)
        copies = [num_tp if shell.on_every_tp_rank else 1 for shell in shells]
        # What is offloaded to the host still crosses between devices.
        squares = torch.stack(norms).to(self.device).square()
        return squares / self._mesh.tensor(copies, torch.float64)

    def masters(self) -> dict[str, Tensor]:
        """See `Engine`: flat partitions, maybe with padding at their ends; buffers by name."""
        return {**self._partitions.masters(), **self._buffers}

    def refresh(self) -> None:
        """See `Engine`."""
        self._partitions.refresh()

    def canonical(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Engine`: copies, on the host, but for buffers."""
        places = self._partitions.places
        like = next(iter(values.values()))
        made: dict[str, Tensor] = {}
        for some in self._shells:
            parts = {name: places[name].view(values).detach() for name, _ in some}
            have = {name: places[name].spans for name, _ in some}
            wanted = some.empty(like)
            redistribute(parts, have, wanted, some.spans(), some.group)
            made |= wanted
        found = {name: shell.wrap(made[name]) for name, shell in self._shell.items()}
        return found | {name: values[name] for name in self._buffers if name in values}

    def assign(self, values: Mapping[str, Tensor], canonical: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        places = self._partitions.places
        for some in self._shells:
            parts = {name: _flat(canonical[name]) for name, _ in some}
            wanted = {name: places[name].view(values).detach() for name, _ in some}
            want = {name: places[name].spans for name, _ in some}
            redistribute(parts, some.spans(), wanted, want, some.group)
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
            if master.numel():
                self._optimizer.initialised(master)["step"].fill_(float(num_steps))

    def _moments(self, moment: str) -> dict[str, Tensor]:
        return {
            key: self._optimizer.initialised(master)[moment] if master.numel() else master
            for key, master in self._partitions.masters().items()
        }

    @torch.no_grad()
    def _sum_whole_gradients(self) -> None:
        """As `sum_whole_gradients`, after the reduction over dp ranks: of stretches alone."""
        if self._mesh.tp_mesh is None:
            return
        parts = [
            part
            for name, part in self.gradient_parts().items()
            if self._shell[name].on_every_tp_rank
        ]
        sum_parts(parts, self._mesh.tp_mesh, self.device)


def allocate(part: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give parameters of `part` that are on the meta device memory for a tp rank's share of them.

    Plain tensors, as libraries know them. What is in it does not matter:
    `PartitionedEngine.start_from` sets all of them.
    """
    for module in part.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            own = local_part(parameter)
            made = nn.Parameter(
                torch.zeros(own.shape, device=device, dtype=dtype),
                requires_grad=parameter.requires_grad,
            )
            # Libraries count what is not split over tp once for all tp ranks.
            made.tensor_model_parallel = is_split(parameter)  # type: ignore[attr-defined]
            module.register_parameter(key, made)


def own_buffers(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Give buffers memory of their own, in `dtype`: libraries cast them with the parameters."""
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            made = torch.zeros(buffer.shape, device=device, dtype=dtype or buffer.dtype)
            module.register_buffer(key, made)


def is_split(parameter: Tensor) -> bool:
    """Whether tp ranks have different parts of it."""
    if not isinstance(parameter, DTensor):
        return False
    axes = parameter.device_mesh.mesh_dim_names or ()
    return "tp" in axes and not parameter.placements[axes.index("tp")].is_replicate()


def _flat(tensor: Tensor) -> Tensor:
    return local_part(tensor).reshape(-1)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _own_experts(value: Tensor, mesh: Mesh) -> Tensor:
    """What a rank of the ep axis has of all experts' values."""
    assert mesh.expert_mesh is not None
    axis = mesh.expert_mesh["ep"]
    return value.chunk(axis.size())[axis.get_local_rank()]


def _along_tp(value: Tensor, shell: Shell, mesh: Mesh) -> Tensor:
    """A tp rank's part of a value."""
    assert mesh.tp_mesh is not None
    # Not its place among shares of a pack: tp ranks may have the same tokens.
    rank = mesh.tp_mesh.get_local_rank()
    for dim, (size, part) in enumerate(zip(shell.shape, shell.tp_shape, strict=True)):
        if part < size:
            return value.narrow(dim, rank * part, part)
    return value
