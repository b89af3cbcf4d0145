"""Initial weights: a pure function of (seed, parameter name), whatever the order or the layout.

What starts at zero and why: modulation, so that every block is the identity at first and gates
open as they are needed (adaLN-Zero, Peebles and Xie, arXiv 2212.09748, section 3.2); the heads, so
that the first prediction is 0; biases. Embedding MLPs of times and conditions are normal with
variance 1 / fan-in: DiT's fixed 0.02 comes to the same at its widths, but leaves a narrow model
almost deaf to its conditions. All other matrices, and each expert's, are Xavier uniform (Glorot and
Bengio 2010, equation 16), as in DiT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kinodit.models.random import generator, normal

RULES: tuple[tuple[str, str], ...] = (
    (r"modulation\.down\.weight$", "xavier"),
    (r"modulation\.", "zero"),
    (r"^heads\.[^.]+\.linear\.", "zero"),
    (r"\.router\.(correction|load|unit|hidden_bias)$", "zero"),
    (r"\.router\.hidden$", "xavier"),
    (r"\.experts\.(up|gate|down)$", "xavier"),
    (r"\.experts\.(up|gate|down)_bias$", "zero"),
    (r"\.bias$", "zero"),
    (r"norm\.weight$", "one"),
    (r"^condition\..*\.weight$", "normal"),
    (r"\.refiner\.(time|pooled)\..*\.weight$", "normal"),
    (r"\.weight$", "xavier"),
)
"""(pattern searched in the parameter's name, rule): the first that matches decides."""


def rule(name: str) -> str:
    """The rule for the parameter `name`; a name that no pattern matches is a programming error."""
    for pattern, choice in RULES:
        if re.search(pattern, name):
            return choice
    raise LookupError(f"no rule initialises parameter {name!r}: add one to RULES")


def initial_value(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The whole initial value, float32 [*shape] on the CPU; a shard is a slice of it."""
    choice = rule(name)
    if choice == "zero":
        return torch.zeros(tuple(shape))
    if choice == "one":
        return torch.ones(tuple(shape))
    source = generator(seed, "init", name)
    fan_out, fan_in = shape[-2:]
    if choice == "normal":
        return normal(source, shape) / math.sqrt(fan_in)
    bound = math.sqrt(6 / (fan_in + fan_out))
    uniform = torch.from_numpy(source.random(tuple(shape), dtype="float32"))
    return (2 * uniform - 1) * bound


def initial_values(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, whole initial value [*parameter.shape]) of every parameter, also of a meta model."""
    for name, parameter in model.named_parameters():
        yield name, initial_value(name, parameter.shape, seed)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Give every parameter of `model` its initial value, in place, cast to its dtype."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, seed))
