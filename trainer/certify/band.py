"""How far rounding alone carries a run, and whether a layout stays within that.

Layouts that sum in another order differ in rounding. How much that may change a tensor is measured,
not guessed: the reference runs again with every input moved by one rounding unit, and a layout may
be at most WIDTH times as far from the reference as the farthest of these is, tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from kinodit.models.moe.tally import NUM_OTHERS
from kinodit.trainer.certify.trace import Array, Trace
from kinodit.trainer.certify.verdict import Verdict, draw_faults, tensor_errors

NUM_PERTURBED = 5
WIDTH = 4.0
FLOOR = 2.0**-20
"""Of the largest tensor's norm: what single precision may move a tensor that no input moves."""

KINDS = ("gradients", "parameters", "averages")


def compare_in_band(
    reference: Trace, perturbed: Sequence[Trace], candidates: Sequence[Trace], reach: float = 0.0
) -> Verdict:
    """The traces of all ranks of one layout against the band around one process.

    reach: how far the optimizer can carry one number. Adam moves a number by its rate whatever the
    size of its gradient, so one whose gradient is 0 but for rounding may go either way: parameters
    and averages may be off by that of one number, seen or not among the perturbed. So may the load
    of a layer's experts by the choice of one token, whose best experts may score alike.

    Losses are compared as tensors of one number. `noise_ratio` of the verdict is the largest
    distance over the spread that it is compared with.
    """
    faults = [*draw_faults(reference, candidates)]
    choices = _one_choice(reference)
    worst = {"losses": 0.0, **dict.fromkeys(KINDS, 0.0)}
    for rank, candidate in enumerate(candidates):
        for kind in worst:
            ratios = noise_ratios(
                _tensors(reference, kind),
                [_tensors(one, kind) for one in perturbed],
                _tensors(candidate, kind),
                reach if kind in ("parameters", "averages") else 0.0,
                choices,
            )
            worst[kind] = max(worst[kind], *ratios.values())
            wrong = [name for name, ratio in ratios.items() if not ratio <= WIDTH]
            if wrong:
                largest = max(wrong, key=lambda name: ratios[name])
                faults.append(
                    f"rank {rank}: {len(wrong)} of {len(ratios)} {kind} are farther off than "
                    f"{WIDTH:.0f} times what rounding does, first {wrong[0]} by "
                    f"{ratios[wrong[0]]:.1f} times, most {largest} by {ratios[largest]:.1f} times"
                )
    gradient_errors = [
        max(tensor_errors(one.gradients, reference.gradients).values()) for one in candidates
    ]
    return Verdict(
        loss_error=_largest(_tensors(reference, "losses"), candidates, "losses"),
        norm_error=0.0,
        max_gradient_error=max(gradient_errors),
        parameter_error=_largest(reference.parameters, candidates, "parameters"),
        average_error=_largest(reference.averages, candidates, "averages"),
        faults=tuple(faults),
        noise_ratio=max(worst.values()),
    )


def noise_ratios(
    reference: Mapping[str, Array],
    perturbed: Sequence[Mapping[str, Array]],
    found: Mapping[str, Array],
    least: float = 0.0,
    units: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """tensor -> its distance from the reference over the spread of the perturbed ones, in norms.

    A spread counts as `least` at least, and as the tensor's own of `units`, if it has one.
    """
    norms = {name: float(np.linalg.norm(value)) for name, value in reference.items()}
    floor = max(least, FLOOR * max(norms.values()))
    ratios = {}
    for name, value in reference.items():
        spread = max(float(np.linalg.norm(one[name] - value)) for one in perturbed)
        other = found.get(name)
        if other is None or other.shape != value.shape:
            ratios[name] = float("inf")
            continue
        distance = float(np.linalg.norm(other - value))
        allowed = max(spread, floor, (units or {}).get(name, 0.0))
        ratios[name] = distance / allowed if np.isfinite(distance) else float("inf")
    return ratios


def _one_choice(reference: Trace) -> dict[str, float]:
    """What one token that goes to another expert moves in the load of each layer, as a norm."""
    units = {}
    for layer, tally in reference.loads[-1].items() if reference.loads else ():
        load = reference.parameters.get(f"{layer}.router.load")
        if load is not None:
            num_choices = float(tally[: len(tally) - len(load) - NUM_OTHERS].sum())
            units[f"{layer}.router.load"] = math.sqrt(2.0) / max(num_choices, 1.0)
    return units


def _tensors(trace: Trace, kind: str) -> Mapping[str, Array]:
    if kind == "losses":
        return {f"loss of step {step}": np.array(x) for step, x in enumerate(trace.losses)}
    return cast(Mapping[str, Array], getattr(trace, kind))


def _largest(reference: Mapping[str, Array], candidates: Sequence[Trace], kind: str) -> float:
    return max(max(tensor_errors(_tensors(one, kind), reference).values()) for one in candidates)
