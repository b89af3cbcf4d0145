"""The peak that MFU is a share of: the best of what was measured, and not trusted below a rate."""

from __future__ import annotations

import time

import pytest
import torch

from kinodit.trainer import peak
from kinodit.trainer.peak import AGAIN_AFTER_S, FIRST_TRIES, PRODUCT_SIZE, Peak, share_of_peak


def test_a_peak_that_was_measured_in_a_busy_moment_is_made_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s, took_s = [5.0], [0.4, 0.3, 0.5, 0.4]
    asked = []

    def product_s(dtype: torch.dtype) -> float:
        asked.append(dtype)
        return took_s.pop(0)

    monkeypatch.setattr(peak, "product_s", product_s)
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    measured = Peak(torch.device("cpu"), torch.bfloat16)
    assert asked == [torch.bfloat16] * FIRST_TRIES
    assert measured.flops_s() == 2 * PRODUCT_SIZE**3 / 0.3
    for after_s, took in ((AGAIN_AFTER_S, 0.1), (2 * AGAIN_AFTER_S, 0.9)):
        now_s[0] = 5.0 + after_s
        took_s.append(took)
        assert measured.flops_s() == 2 * PRODUCT_SIZE**3 / 0.1, "the best of all"
        assert measured.flops_s() == 2 * PRODUCT_SIZE**3 / 0.1
        assert not took_s, "once a minute"


def test_a_product_takes_time() -> None:
    assert Peak(torch.device("cpu"), torch.float32).flops_s() > 1e6


def test_a_rate_above_the_peak_is_no_share_of_it() -> None:
    assert share_of_peak(3.0, 4.0) == 0.75
    assert share_of_peak(4.0, 4.0) == 1.0
    assert share_of_peak(4.1, 4.0) is None
    assert share_of_peak(3.0, 0.0) is None
