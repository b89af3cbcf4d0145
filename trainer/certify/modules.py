"""The comparison for models that are not ours: any two modules, or any two training steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kinodit.models.errors import ConfigError
from kinodit.trainer.certify.probe import float_tensors
from kinodit.trainer.certify.trace import Array, Trace, whole
from kinodit.trainer.certify.verdict import TOLERANCE, Verdict, compare_traces


@dataclass(frozen=True)
class StepOutcome:
    """What a training step of yours left: whole tensors, gathered if they were sharded.

    Names must be the same on both sides; what is left out is not compared.
    """

    loss: float
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)


Candidate = nn.Module | Callable[..., StepOutcome]


def compare(
    reference: Candidate,
    candidate: Candidate,
    inputs: Sequence[Any] = (),
    *,
    loss: Callable[[Any], Tensor] | None = None,
    tolerance: float = TOLERANCE,
) -> Verdict:
    """Whether `candidate` computes what `reference` does, gradient by gradient.

    Either may be a module, which is called with `inputs` and whose gradients are taken, or a
    function that is called with them and returns what its step left. On several ranks every rank
    calls this, and DTensor parameters are gathered; what each rank puts into its loss is up to the
    modules. `loss` turns a module's output into a scalar; by default the weighted sum of squares of
    its floating tensors. Errors are scaled by the largest value of each kind.

    Raises:
        ConfigError: the two have parameters of different names.
    """
    ours, theirs = (_outcome(one, inputs, loss) for one in (candidate, reference))
    if ours.gradients.keys() != theirs.gradients.keys():
        different = sorted(ours.gradients.keys() ^ theirs.gradients.keys())
        raise ConfigError(
            f"compare: {len(different)} gradients are on one side only, for instance "
            f"{different[0]!r}: the two must name their parameters alike"
        )
    return compare_traces(_trace(theirs), [_trace(ours)], tolerance)


def _outcome(
    one: Candidate, inputs: Sequence[Any], loss: Callable[[Any], Tensor] | None
) -> StepOutcome:
    if not isinstance(one, nn.Module):
        return one(*inputs)
    for parameter in one.parameters():
        parameter.grad = None
    value = (loss or sum_of_squares)(one(*inputs))
    value.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in one.named_parameters()
        if parameter.requires_grad
    }
    return StepOutcome(float(value.detach()), gradients)


def sum_of_squares(output: Any) -> Tensor:
    """Of every floating tensor in a module's output, each number weighted by its place.

    Weights keep the sum from being the same for outputs in another order.
    """
    total: Tensor | None = None
    for tensor in float_tensors(output):
        place = torch.arange(tensor.numel(), device=tensor.device, dtype=tensor.dtype)
        term = (tensor.flatten().square() * (1 + place % 7)).sum()
        total = term if total is None else total + term
    assert total is not None, "a module that returns no floating tensor"
    return total


def _trace(outcome: StepOutcome) -> Trace:
    def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
        return {name: whole(x).astype(np.float64) for name, x in tensors.items()}

    return Trace(
        losses=[outcome.loss],
        gradients=arrays(outcome.gradients),
        parameters=arrays(outcome.parameters),
    )
