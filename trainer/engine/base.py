"""What the trainer asks of an engine, whichever library is behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from kinodit.models.tokens import TokenBatch

Predictions = Mapping[str, Tensor]
Forward = Callable[[TokenBatch], Predictions]
"""The model under the engine's sharding and precision: batch -> name -> [N, C]."""


class Engine(Protocol):
    """Owns the model's parameters, their gradients and the optimizer.

    One optimizer step is: `forward_backward` for each micro-batch (`last` for the last one), then
    `clip`, then `step` or `skip`. Gradients are sums over micro-batches and ranks, never means.
    All ranks make the same calls in the same order.
    """

    device: torch.device
    model: nn.Module

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        ...

    def forward_backward(
        self, batch: TokenBatch, loss: Callable[[Predictions], Tensor], *, last: bool
    ) -> Tensor:
        """Forward on `batch`, then backward from the scalar `loss(predictions)`, detached.

        Gradients are reduced over ranks when `last`.
        """
        ...

    def clip(self, max_norm: float) -> Tensor:
        """Global gradient norm (scalar), after scaling gradients to at most `max_norm` (if > 0)."""
        ...

    def step(self, lr: float) -> None:
        """One optimizer update at rate `lr`; drops the gradients."""
        ...

    def skip(self) -> None:
        """Drop the gradients instead of `step`: parameters and moments stay as they are."""
        ...

    def inference(self) -> AbstractContextManager[Forward]:
        """A forward without gradients. Collective: every rank makes the same number of calls."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, whole gradient) of every parameter, after the last `forward_backward`.

        Collective, and each gradient is gathered whole: for certificates and tests.
        """
        ...

    def gradient_parts(self) -> dict[str, Tensor]:
        """This rank's parts of the reduced gradients, which `clip` and `step` will use."""
        ...

    def gradient_squares(self, names: Sequence[str]) -> Tensor:
        """[n] on the device: this rank's parts of the squared norms of n parameters' gradients.

        After the last `forward_backward` and before `clip`. Their sums over ranks are the whole.
        """
        ...

    def masters(self) -> dict[str, Tensor]:
        """The parameters that updates go into, as they live: for arithmetic element by element.

        And the model's buffers, which routers of experts keep their balance in.

        Names and shapes are the engine's own; `canonical` tells what they are.
        """
        ...

    def refresh(self) -> None:
        """Let the model compute with what is in `masters` now, after somebody wrote there.

        Collective.
        """
        ...

    def canonical(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors laid out as `masters` are, by canonical name and in canonical shape.

        DTensors where there are several ranks, sharded as the native engine's. They share the
        memory of `values` or are copies. Collective.
        """
        ...

    def assign(self, values: Mapping[str, Tensor], canonical: Mapping[str, Tensor]) -> None:
        """The way back: write what `canonical` returned, changed since, into `values`. Collective.

        The model does not compute with it before `refresh`, if `values` are `masters`.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer moments by canonical name, as `canonical` lays them out.

        Keys: `model/NAME`, `optim/MOMENT/NAME`. Whoever writes into them has to call `load`.
        Collective.
        """
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`, tensors that `state()` returned and that were written into.

        Collective.
        """
        ...

    def set_num_steps(self, num_steps: int) -> None:
        """Tell the optimizer how many updates the loaded state has behind it."""
        ...
