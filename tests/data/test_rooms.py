"""A room is used again when nobody has a part of what lies in it, and not before."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from kinodit.data.rooms import SPARE, STALE_TURNS, Room, Rooms


def taken(rooms: Rooms, num_bytes: int = 1000) -> Room:
    room, descriptor = rooms.take(num_bytes)
    if descriptor >= 0:
        os.close(descriptor)
    return room


def test_a_room_is_free_when_the_last_view_of_it_is_gone() -> None:
    rooms = Rooms()
    first = taken(rooms)
    whole = rooms.hand_over(first)
    part = torch.from_numpy(whole[8:24].reshape(4, 4))
    del whole
    row = part[1]
    del part
    second = taken(rooms)
    assert second is not first and second.number != first.number
    row.fill_(7)
    assert first.memory[12:16] == b"\7" * 4
    del row
    assert taken(rooms) is first and rooms.num_made == 2


def test_another_thread_may_let_go_of_it() -> None:
    rooms = Rooms()
    held = [rooms.hand_over(taken(rooms))]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    taken(rooms)
    assert rooms.num_made == 1


def test_a_room_that_does_not_fit_is_left_alone() -> None:
    rooms = Rooms()
    room = taken(rooms, 1000)
    rooms.leave(room)
    assert taken(rooms, 1001) is not room
    assert taken(rooms, int(1000 / SPARE) - 1) is not room
    assert taken(rooms, int(1000 / SPARE)) is room


def test_rooms_that_are_not_used_any_more_are_let_go_and_named() -> None:
    rooms = Rooms()
    old, used = taken(rooms, 5000), taken(rooms)
    rooms.leave(old)
    for _ in range(STALE_TURNS + 3):
        assert rooms.gone() == []
        rooms.leave(used)
        assert taken(rooms) is used
    assert rooms.gone() == [old.number] and rooms.gone() == []
    assert taken(rooms, 5000) is not old


def test_a_step_of_many_samples_uses_the_rooms_of_another() -> None:
    rooms = Rooms()
    for _ in range(4):
        step = [rooms.hand_over(taken(rooms)) for _ in range(4 * STALE_TURNS)]
        step.clear()
    assert rooms.num_made == 4 * STALE_TURNS and rooms.gone() == []


def test_what_is_held_beyond_what_may_be_mapped_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinodit.data.rooms.MAX_HELD", 3)
    rooms, held = Rooms(), []
    for number in range(8):
        room = taken(rooms)
        room.memory[:] = bytes([number]) * 1000
        held.append(rooms.hand_over(room))
    assert rooms.num_made == 4
    assert [whole.tolist() for whole in held] == [[number] * 1000 for number in range(8)]
    held.clear()
    del room
    held = [rooms.hand_over(taken(rooms)) for _ in range(3)]
    assert rooms.num_made == 4


def test_who_fills_a_room_cannot_make_it_smaller() -> None:
    """Reading memory of which the file has been cut off ends a process."""
    room, descriptor = Rooms().take(8192)
    for num_bytes in (4096, 0, 9000):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, num_bytes)
    os.close(descriptor)
    assert len(bytes(room.memory)) == 8192


def test_what_was_handed_over_outlives_the_rooms() -> None:
    rooms = Rooms()
    whole = rooms.hand_over(taken(rooms))
    whole[:] = 9
    del rooms
    assert whole.sum() == 9 * 1000
