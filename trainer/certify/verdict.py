"""Two traces side by side: how far apart, and where first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kinodit.trainer.certify.trace import Array, Trace

TOLERANCE = 1e-12


@dataclass(frozen=True)
class Verdict:
    """Errors of a candidate against its reference; `faults` says what is beyond tolerance.

    Losses and norms are compared relatively; gradients, parameters and averages by the largest
    difference over the largest value of all tensors of that kind in the reference. noise_ratio is
    that of `compare_in_band`.
    """

    loss_error: float
    norm_error: float
    max_gradient_error: float
    parameter_error: float
    average_error: float
    faults: tuple[str, ...]
    noise_ratio: float | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is beyond the tolerance."""
        return not self.faults


def compare_traces(
    reference: Trace, candidates: Sequence[Trace], tolerance: float = TOLERANCE
) -> Verdict:
    """The traces of all ranks of one layout against that of one process.

    Gathered tensors are the same on every rank unless a layout is broken, so each rank's are
    looked at. Names of tensors that are off come in the order of the model's parameters.
    """
    faults = [*draw_faults(reference, candidates)]
    worst: dict[str, float] = {}
    for rank, candidate in enumerate(candidates):
        for what, ours, theirs in (
            ("loss", candidate.losses, reference.losses),
            ("gradient norm", candidate.norms, reference.norms),
        ):
            error = _relative(ours, theirs)
            worst[what] = max(worst.get(what, 0.0), error)
            if not error <= tolerance:
                faults.append(
                    f"rank {rank}: {what} is off by {error:.1e} within {len(theirs)} steps"
                )
        for what, found, expected in (
            ("gradient", candidate.gradients, reference.gradients),
            ("parameter", candidate.parameters, reference.parameters),
            ("average", candidate.averages, reference.averages),
        ):
            errors = tensor_errors(found, expected)
            worst[what] = max([worst.get(what, 0.0), *errors.values()])
            wrong = {name: error for name, error in errors.items() if not error <= tolerance}
            if wrong:
                first = next(iter(wrong))
                largest = max(wrong, key=lambda name: wrong[name])
                faults.append(
                    f"rank {rank}: {len(wrong)} of {len(errors)} {what}s are off, first {first} by "
                    f"{wrong[first]:.1e}, most {largest} by {wrong[largest]:.1e}"
                )
    return Verdict(
        worst["loss"],
        worst["gradient norm"],
        worst["gradient"],
        worst["parameter"],
        worst["average"],
        tuple(faults),
    )


def tensor_errors(found: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """Each tensor's largest difference over the largest value of all; infinite where one lacks."""
    scale = max((float(np.abs(value).max(initial=0.0)) for value in expected.values()), default=1.0)
    errors = {}
    for name, value in expected.items():
        other = found.get(name)
        if other is None or other.shape != value.shape:
            errors[name] = float("inf")
            continue
        difference = np.abs(other - value).max(initial=0.0)
        errors[name] = float(difference) / scale if np.isfinite(difference) else float("inf")
    return errors


def _relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    pairs = zip(ours, theirs, strict=True)
    errors = [abs(one - other) / max(abs(other), 1e-300) for one, other in pairs]
    return float("inf") if any(error != error for error in errors) else max(errors, default=0.0)


def draw_faults(reference: Trace, candidates: Sequence[Trace]) -> list[str]:
    """Samples that were drawn otherwise, twice differently, or not at all."""
    drawn: dict[tuple[int, int], set[str]] = {}
    for candidate in candidates:
        for key, digest in candidate.draws.items():
            drawn.setdefault(key, set()).add(digest)
    faults = []
    for key, digest in reference.draws.items():
        found = drawn.get(key, set())
        if found != {digest}:
            step, slot = key
            what = "never came" if not found else "has other latents, noise or noise level"
            faults.append(f"sample {slot} of step {step} {what}")
    extra = sorted(set(drawn) - set(reference.draws))
    if extra:
        faults.append(f"sample {extra[0][1]} of step {extra[0][0]} belongs to no one")
    return faults
