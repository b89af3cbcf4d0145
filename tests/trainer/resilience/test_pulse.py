"""Signs of life are read whole, however often they are given."""

from __future__ import annotations

import os
import signal
import time

from kinodit.trainer.resilience.pulse import Page, Sign


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
        end_s, last = time.monotonic() + 1.5, 0
        seen = set()
        while time.monotonic() < end_s:
            sign = page.read()
            if sign.activity == "start":
                continue
            name = "abcdefgh"[sign.step % 8] * 20
            assert sign == Sign(float(sign.step), 5.0, sign.step, sign.step, name, name)
            assert sign.step >= last
            last = sign.step
            seen.add(last)
        assert len(seen) > 100
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
