"""Signs of life are read whole, however often they are given, and are good for long enough."""

from __future__ import annotations

import os
import signal
import time

import pytest

from kinodit.trainer.resilience.pulse import START_LIMIT_S, Page, Pulse, Sign, Watched

HANG_S, SLOW_S = 10.0, 1000.0


def give_signs(page: Page) -> None:
    count = 0
    while True:
        count += 1
        name = "abcdefgh"[count % 8] * 20
        page.write(Sign(float(count), 5.0, count, count, name, name))


def test_a_sign_is_never_read_in_part() -> None:
    page = Page()
    child = os.fork()
    if child == 0:
        try:
            give_signs(page)
        finally:
            os._exit(1)
    try:
        time.sleep(0.1)
        begin_s, last = time.monotonic(), 0
        seen: set[int] = set()
        # However seldom two processes of a busy machine run at once.
        while (now_s := time.monotonic()) < begin_s + 1.5 or len(seen) <= 100:
            assert now_s < begin_s + 60
            sign = page.read()
            if sign.activity == "start":
                continue
            name = "abcdefgh"[sign.step % 8] * 20
            assert sign == Sign(float(sign.step), 5.0, sign.step, sign.step, name, name)
            assert sign.step >= last
            last = sign.step
            seen.add(last)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_last_whole_sign_stands_where_a_writer_was_stopped() -> None:
    page = Page()
    for step in range(1, 4):
        page.write(Sign(1e9 + step, 1.0, step, 0, "step", ""))
    assert page.read().step == 3
    # The next one goes where step 2 was, and gets no farther than its first bytes.
    before = bytes(page._memory[:])
    page.write(Sign(1e9 + 4, 1.0, 4, 0, "step", ""))
    after = bytes(page._memory[:])
    first = next(i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y)
    page._memory[:] = after[: first + 1] + before[first + 1 :]
    assert page.read().step == 3


def test_the_later_of_two_signs_of_one_instant_stands() -> None:
    page = Page()
    for turn in range(5):
        page.write(Sign(1e9, 1.0, 7, 3, f"activity {turn}", ""))
        assert page.read().activity == f"activity {turn}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[seconds], for tests to set."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def page(clock: list[float]) -> Page:
    return Page()


def watched(page: Page, hang_s: float = HANG_S) -> Pulse:
    pulse = Pulse(page)
    pulse.watch(Watched(1, 2, "/run/stacks"), hang_s, SLOW_S)
    return pulse


def test_a_step_has_its_limit_once_it_is_known_how_long_one_takes(
    page: Page, clock: list[float]
) -> None:
    assert page.read().limit_s == START_LIMIT_S
    pulse = watched(page)
    assert page.who() == Watched(1, 2, "/run/stacks")
    # The first one compiles: it says nothing about the others.
    for step, seconds in enumerate([100.0, 1.0]):
        pulse.step(step)
        assert page.read().limit_s == SLOW_S
        clock[0] += seconds
    pulse.step(2)
    assert page.read().limit_s == HANG_S
    pulse.beat("eval", slow=True)
    assert page.read().limit_s == SLOW_S
    pulse.beat("compute", slow=False)
    assert page.read().limit_s == HANG_S


@pytest.mark.parametrize("saves", [False, True])
def test_five_times_the_longest_step(saves: bool, page: Page, clock: list[float]) -> None:
    pulse = watched(page)
    for step, seconds in enumerate([100.0, 1.0, 7.0, 2.0]):
        pulse.step(step)
        clock[0] += seconds
        if saves:
            # What follows a step is no part of it, and does not hide how long it was.
            pulse.beat("save", slow=True)
            clock[0] += 500.0
    pulse.step(4)
    assert page.read().limit_s == 5 * 7.0


def test_waiting_for_data_has_as_much_more_as_its_own_limits_allow(
    page: Page, clock: list[float]
) -> None:
    pulse = watched(page)
    for step in range(3):
        pulse.step(step)
        clock[0] += 0.1
    pulse.step(3)
    pulse.beat("data", slow=False, more_s=9.0)
    assert page.read().limit_s == HANG_S + 9.0
    # Who has its samples waits in a message for those who do not.
    pulse.message("dp", "all_reduce")
    assert page.read().limit_s == HANG_S + 9.0
    pulse.beat("step", slow=False)
    assert page.read().limit_s == HANG_S
    pulse.beat("data", slow=False, more_s=1e6)
    assert page.read().limit_s == SLOW_S


def test_signs_tell_the_step_and_the_last_message(page: Page, clock: list[float]) -> None:
    pulse = watched(page)
    pulse.step(7)
    clock[0] += 3.0
    pulse.message("fsdp", "all_gather")
    sign = page.read()
    assert (sign.time_s, sign.step, sign.num_messages) == (clock[0], 7, 1)
    assert sign.collective == "all_gather (fsdp)"


def test_zero_is_off(page: Page, clock: list[float]) -> None:
    pulse = watched(page, hang_s=0.0)
    for step in range(3):
        pulse.step(step)
        assert page.read().limit_s == float("inf")
        clock[0] += 1.0
