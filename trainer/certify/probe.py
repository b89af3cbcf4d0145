"""One number for what each module puts out and one for the gradient it gets, in any layout.

Sums over elements do not depend on who holds which tokens, heads or columns: each rank adds up what
it has, divided by the number of ranks that have the same, and the sums over ranks can be compared
with those of one process. The first module, in the order of computation, whose sum differs is where
a layout goes wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kinodit.models.attention import AttentionOp
from kinodit.models.mmdit import MMDiT
from kinodit.models.tokens import AttentionLayout
from kinodit.trainer.parallel.apply import model_blocks
from kinodit.trainer.parallel.sequence import Place

TOLERANCE = 1e-9
"""Of a sum, relative to the sum of absolute values: rounding is below it, a wrong token above."""

ROW = re.compile(r"\.(attention\.out|mlp\.down|mlp|mlp\.experts|mlp\.shared(\.down)?)$")
CONDITION = re.compile(r"^condition|^heads\.[^.]+\.modulation|\.refiner|\.modulation\.down$")
COLUMN = re.compile(r"^shared_modulation|\.modulation\.linear$")


@dataclass
class Sums:
    """Of one module's outputs (`value`, with absolute values `scale`) and their gradients."""

    value: float = 0.0
    scale: float = 0.0
    gradient: float = 0.0
    gradient_scale: float = 0.0


@dataclass
class Probe:
    """Sums by module name, in the order of the forward. `refined`: streams with a refiner."""

    place: Place
    refined: Sequence[str] = ()
    sums: dict[str, Sums] = field(default_factory=dict)
    _block: str = ""

    def attach(self, model: MMDiT) -> None:
        """Note every call of every module inside `model`, and of its attention."""
        names = {module: name for name, module in model.named_modules()}
        blocks = set(model_blocks(model))
        for module, name in names.items():
            if module is model or isinstance(module, nn.ModuleDict | nn.ModuleList):
                continue
            if module in blocks:
                module.register_forward_pre_hook(self._entering(name))
            module.register_forward_hook(self._noting(name))
        model.attend = self._watched(model.attend)

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._block = name

        return hook

    def _noting(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in float_tensors(output):
                self.note(name, tensor)

        return hook

    def _watched(self, attend: AttentionOp) -> AttentionOp:
        def watched(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
            out = attend(q, k, v, layout)
            self.note(f"{self._block}.attend", out)
            return out

        return watched

    def note(self, name: str, output: Tensor) -> None:
        """Add one output of the module `name`, and its gradient when it comes."""
        sums = self.sums.setdefault(name, Sums())
        copies, gradient_copies = self._copies(name)
        seen = output.detach().double()
        sums.value += float(seen.sum()) / copies
        sums.scale += float(seen.abs().sum()) / copies

        def add(gradient: Tensor) -> None:
            sums.gradient += float(gradient.double().sum()) / gradient_copies
            sums.gradient_scale += float(gradient.double().abs().sum()) / gradient_copies

        if output.requires_grad:
            output.register_hook(add)

    def _copies(self, name: str) -> tuple[int, int]:
        """Ranks that have the same output, and that get the same gradient.

        What matrices split by rows put out is a part of a sum: it adds up as it is. So do the
        gradients of what every rank computes for itself, of which each has its tokens' part.
        """
        if ROW.search(name) and ".refiner" not in name:
            return 1, self.place.tp
        whole = CONDITION.search(name) or any(name == f"embeds.{x}.linear" for x in self.refined)
        if whole:
            return self.place.num_shares, 1
        return (self.place.cp, 1) if COLUMN.search(name) else (1, 1)


def float_tensors(output: Any) -> Iterator[Tensor]:
    """The floating tensors inside what a module returned."""
    if isinstance(output, Tensor):
        if torch.is_floating_point(output):
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from float_tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from float_tensors(value)


def first_difference(
    reference: Mapping[str, Sums], ranks: Sequence[Mapping[str, Sums]]
) -> tuple[str, str] | None:
    """(module, "output" or "gradient") where ranks together first differ from one process.

    None if they differ nowhere. The backward meets modules in the opposite order.
    """
    for name, expected in reference.items():
        value = sum(sums[name].value for sums in ranks if name in sums)
        if not abs(value - expected.value) <= TOLERANCE * max(expected.scale, 1e-300):
            return name, "output"
    for name, expected in reversed(list(reference.items())):
        value = sum(sums[name].gradient for sums in ranks if name in sums)
        if not abs(value - expected.gradient) <= TOLERANCE * max(expected.gradient_scale, 1e-300):
            return name, "gradient"
    return None
