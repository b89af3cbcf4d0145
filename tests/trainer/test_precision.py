"""bfloat16 and compiled blocks stay close to the float32 run they stand for."""

from __future__ import annotations

import pytest

from kinodit.trainer.parallel.apply import PrecisionConfig
from tests.parity.test_layouts import Layout, Trace, run
from tests.support.ranks import Ranks

FLOAT32 = PrecisionConfig()
BF16 = PrecisionConfig(compute="bfloat16")
STEPS = 6


@pytest.fixture(scope="module")
def float32() -> Trace:
    return run(0, 1, Layout(1), FLOAT32, STEPS)


def distance(trace: Trace, reference: Trace) -> float:
    return max(abs(a / b - 1) for a, b in zip(trace.losses, reference.losses, strict=True))


def test_bf16_on_one_process(float32: Trace) -> None:
    trace = run(0, 1, Layout(1), BF16, STEPS)
    assert 1e-6 < distance(trace, float32) < 0.02


@pytest.mark.gloo
@pytest.mark.parametrize("dp_replicate", [1, 2])
def test_bf16_on_two_ranks(dp_replicate: int, two: Ranks, float32: Trace) -> None:
    traces = two.run(run, Layout(2, dp_replicate=dp_replicate), BF16, STEPS)
    assert traces[0].losses == traces[1].losses
    assert 1e-6 < distance(traces[0], float32) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # what the compiler itself warns of
def test_compiled_blocks(float32: Trace) -> None:
    trace = run(0, 1, Layout(1, compiled=True), FLOAT32, STEPS)
    assert distance(trace, float32) < 1e-4
