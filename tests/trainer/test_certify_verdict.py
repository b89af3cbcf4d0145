"""What counts as a difference from one process: in float64, and beside what rounding does."""

from __future__ import annotations

import numpy as np
import pytest

from kinodit.models.moe.tally import NUM_OTHERS
from kinodit.trainer.certify.band import compare_in_band
from kinodit.trainer.certify.trace import Trace
from kinodit.trainer.certify.verdict import compare_traces


def traces() -> tuple[Trace, Trace]:
    tensors = {"a": np.array([1.0, -4.0]), "b": np.array([0.5])}
    made = [
        Trace([1.0], [2.0], dict(tensors), dict(tensors), dict(tensors), {(0, 0): "x", (0, 1): "y"})
        for _ in range(2)
    ]
    return made[0], made[1]


def test_errors_are_scaled_by_the_largest_value_and_told_in_order() -> None:
    reference, candidate = traces()
    assert compare_traces(reference, [candidate]).ok
    candidate.gradients["a"] = np.array([1.0, -4.0 + 4e-9])
    candidate.gradients["b"] = np.array([0.5 + 8e-9])
    verdict = compare_traces(reference, [reference, candidate])
    assert verdict.max_gradient_error == pytest.approx(2e-9, rel=1e-3)
    assert verdict.parameter_error == verdict.loss_error == 0
    (fault,) = verdict.faults
    assert fault == "rank 1: 2 of 2 gradients are off, first a by 1.0e-09, most b by 2.0e-09"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_or_not_there_is_a_fault(value: float) -> None:
    reference, candidate = traces()
    candidate.parameters["b"] = np.array([value])
    assert not compare_traces(reference, [candidate]).ok
    reference, candidate = traces()
    candidate.losses = [value]
    assert "loss" in compare_traces(reference, [candidate]).faults[0]
    reference, candidate = traces()
    del candidate.averages["b"]
    assert "averages" in compare_traces(reference, [candidate]).faults[0]


def test_samples_that_are_missing_or_drawn_twice_are_told() -> None:
    reference, candidate = traces()
    other = traces()[1]
    candidate.draws, other.draws = {(0, 0): "x"}, {(0, 0): "z", (0, 9): "?"}
    assert compare_traces(reference, [candidate, other]).faults[:3] == (
        "sample 0 of step 0 has other latents, noise or noise level",
        "sample 1 of step 0 never came",
        "sample 9 of step 0 belongs to no one",
    )


def test_the_band_is_what_rounding_does() -> None:
    reference, candidate = traces()
    moved = [replace_gradient(traces()[0], 0.5 + 1e-3 * k) for k in (-1, 1, 2)]
    assert compare_in_band(reference, moved, [candidate]).ok
    verdict = compare_in_band(reference, moved, [replace_gradient(candidate, 0.5 + 7.9e-3)])
    assert verdict.ok and verdict.noise_ratio == pytest.approx(3.95, rel=1e-3)
    verdict = compare_in_band(reference, moved, [reference, replace_gradient(candidate, 0.5084)])
    (fault,) = verdict.faults
    assert fault.startswith("rank 1: 1 of 2 gradients are farther off than 4 times what rounding")
    assert "first b by 4.2 times" in fault
    # One number of a parameter may go the other way than in any rerun, and no two.
    candidate = traces()[1]
    candidate.parameters["b"] = np.array([0.5 + 7e-4])
    assert not compare_in_band(reference, moved, [candidate]).ok
    assert compare_in_band(reference, moved, [candidate], reach=2e-4).ok
    candidate.parameters["b"] = np.array([0.5 + 9e-4])
    assert not compare_in_band(reference, moved, [candidate], reach=2e-4).ok
    candidate = traces()[1]
    # What no input moves may move by single precision's rounding, and no more.
    candidate.gradients["a"] = np.array([1.0, -4.0 + 1e-6])
    assert compare_in_band(reference, moved, [candidate]).ok
    candidate.gradients["a"] = np.array([1.0, -4.0 + 1e-4])
    assert not compare_in_band(reference, moved, [candidate]).ok
    candidate.gradients["a"] = np.array([1.0, np.nan])
    assert not compare_in_band(reference, moved, [candidate]).ok


def replace_gradient(trace: Trace, value: float) -> Trace:
    trace.gradients["b"] = np.array([value])
    return trace


def test_a_token_may_go_to_another_expert_than_in_any_rerun_and_no_crowd() -> None:
    def routed(moved: int) -> Trace:
        """[E] 10 choices each of 4 experts in the last step, `moved` of them to the next."""
        counts = np.array([10.0 - moved, 10.0 + moved, 10.0, 10.0])
        made = traces()[0]
        made.loads = [{"layer": np.concatenate([counts, np.ones(4), np.zeros(NUM_OTHERS)])}]
        for kept in (made.parameters, made.averages):
            kept["layer.router.load"] = counts / counts.sum()
        return made

    same = [routed(0)] * 5
    assert compare_in_band(routed(0), same, [routed(1)]).ok
    assert compare_in_band(routed(0), same, [routed(4)]).noise_ratio == pytest.approx(4.0)
    assert len(compare_in_band(routed(0), same, [routed(5)]).faults) == 2
