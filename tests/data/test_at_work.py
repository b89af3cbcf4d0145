"""What threads are at is read by their process, and by its parent whatever the process is in."""

from __future__ import annotations

import os
import signal
import threading
import time

from kinodit.data.at_work import NUM_PLACES, AtWork
from tests.support.decoders import hold


def test_a_parent_reads_what_a_child_hangs_over() -> None:
    notes = AtWork()
    child = os.fork()
    if not child:
        notes.end(notes.begin("sample 'done'"))
        notes.begin("sample 'bad' (clips:3 in 000.tar)")
        hold()
    try:
        end_s = time.monotonic() + 10
        while not notes.read() and time.monotonic() < end_s:
            time.sleep(0.01)
        time.sleep(0.1)
        (note,) = notes.read()
        assert note.what == "sample 'bad' (clips:3 in 000.tar)"
        assert 0.1 <= time.monotonic() - note.since_s < 11
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_each_thread_has_its_own_and_the_oldest_is_first() -> None:
    notes, is_there, go_on = AtWork(), threading.Event(), threading.Event()

    def work() -> None:
        place = notes.begin("other")
        is_there.set()
        go_on.wait(10)
        notes.end(place)

    other = threading.Thread(target=work)
    place = notes.begin("mine")
    other.start()
    assert is_there.wait(10)
    found = notes.read()
    assert [note.what for note in found] == ["mine", "other"]
    assert [note.thread for note in found] == [threading.get_ident(), other.ident]
    thread = f"0x{threading.get_ident():016x}"
    assert found[0].told(found[0].since_s + 66.25) == f"mine for 66.2 s in thread {thread}"
    notes.end(place)
    assert [note.what for note in notes.read()] == ["other"]
    go_on.set()
    other.join()
    assert notes.read() == []


def test_places_are_used_again_and_work_goes_on_without_one() -> None:
    notes = AtWork()
    for _ in range(3):
        names = [f"sample {number}" for number in range(NUM_PLACES + 2)]
        places = [notes.begin(name) for name in names]
        assert [note.what for note in notes.read()] == names[:NUM_PLACES]
        for place in places:
            notes.end(place)
        assert notes.read() == []


def test_a_long_name_is_cut_between_letters() -> None:
    notes = AtWork()
    notes.begin("x" + "ä" * 400)
    (note,) = notes.read()
    assert set(note.what[1:]) == {"ä"} and len(note.what) > 200
