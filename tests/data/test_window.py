"""Which source frames make a window: worked examples and bounds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinodit.data.config import DecodeConfig
from kinodit.data.window import frame_offsets, num_window_starts, pick_window, source_rate


@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (24.0, 8.0, (0, 3, 6, 9, 12)),
        (25.0, 8.0, (0, 3, 6, 9, 12)),
        (30.0, 24.0, (0, 1, 2, 3, 5)),
        (29.97, 29.97, (0, 1, 2, 3, 4)),
        (30000 / 1001, 29.97, (0, 1, 2, 3, 4)),
        (10.0, 24.0, (0, 0, 0, 1, 1)),
        (24.0, 0.5, (0, 48, 96, 144, 192)),
    ],
)
def test_offsets(rate: float, fps: float, expected: tuple[int, ...]) -> None:
    config = DecodeConfig(num_frames=5, fps=fps)
    assert frame_offsets(source_rate(rate), config) == expected


def test_a_window_begins_anywhere_it_fits_and_equally_often() -> None:
    config = DecodeConfig(num_frames=4, fps=8.0)
    rate = source_rate(24.0)
    assert num_window_starts(10, rate, config) == 1
    assert num_window_starts(9, rate, config) == 0
    assert pick_window(9, rate, config, 0.5) == ()
    starts = [pick_window(15, rate, config, u / 600)[0] for u in range(600)]
    assert [starts.count(first) for first in range(6)] == [100] * 6


def test_the_first_window_is_always_at_the_start() -> None:
    config = DecodeConfig(num_frames=4, fps=8.0, window="first")
    assert pick_window(100, source_rate(24.0), config, 0.99) == (0, 3, 6, 9)
    assert num_window_starts(9, source_rate(24.0), config) == 0


@settings(deadline=None)
@given(
    count=st.integers(1, 500),
    rate=st.integers(1, 120_000),
    frames=st.integers(1, 40),
    fps=st.sampled_from([0.5, 1.0, 8.0, 12.0, 23.976, 24.0, 29.97, 60.0]),
    u=st.floats(0, 1, exclude_max=True),
)
def test_windows_stay_within_the_clip(
    count: int, rate: int, frames: int, fps: float, u: float
) -> None:
    config = DecodeConfig(num_frames=frames, fps=fps)
    wanted = pick_window(count, rate, config, u)
    assert bool(wanted) == (num_window_starts(count, rate, config) > 0)
    if wanted:
        assert len(wanted) == frames and wanted == tuple(sorted(wanted))
        assert wanted[0] >= 0 and wanted[-1] < count
