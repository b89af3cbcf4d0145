"""A ledger of consumed samples tells what a run was trained on, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinodit.data.plan import assign, plan
from kinodit.data.spec import DatasetSpec, PlanSpec
from kinodit.trainer.consumed import FOLDER, LIVES, ConsumedError
from kinodit.trainer.verify_consumed import Verdict, verify

SPEC = PlanSpec((DatasetSpec("a", "", 11, weight=2.0), DatasetSpec("b", "", 7)), 6, 3, seed=4)
Row = dict[str, Any]


def rows_of(life: int, steps: range, size: int, offset: int = 0) -> dict[int, list[Row]]:
    """Rank -> rows of the steps of one life."""
    found: dict[int, list[Row]] = {rank: [] for rank in range(size)}
    for step in steps:
        batch = plan(SPEC, step + offset)
        for rank in range(size):
            samples = [
                [ref.slot, ref.dataset, ref.epoch, ref.index, ref.index]
                for pack in assign(batch, rank, size)
                for ref in pack
            ]
            row = {"life": life, "step": step, "data_step": step + offset, "samples": samples}
            found[rank].append(row)
    return found


def write(root: Path, lives: list[tuple[range, int, int]], began: list[int]) -> Path:
    """A ledger of lives (steps, ranks, data offset), each beginning at a step."""
    folder = root / FOLDER
    folder.mkdir()
    with (folder / LIVES).open("w") as file:
        for number, (first, (_, size, offset)) in enumerate(zip(began, lives, strict=True)):
            life = {"number": number, "step": first, "data_offset": offset, "num_ranks": size}
            file.write(json.dumps({**life, "plan": SPEC.fingerprint}) + "\n")
    for number, (steps, size, offset) in enumerate(lives):
        for rank, rows in rows_of(number, steps, size, offset).items():
            with (folder / f"{rank:04d}.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return root


LIVES_OF_A_RUN = [(range(0, 5), 2, 0), (range(3, 9), 3, 0), (range(8, 14), 1, 0)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """14 steps on two, three and one rank; the second life redid two steps, the third one."""
    return write(tmp_path, LIVES_OF_A_RUN, [0, 3, 8])


def test_a_run_with_restarts_on_other_ranks_is_exact(run: Path) -> None:
    verdict = verify(run, SPEC)
    assert verdict == Verdict(3, 14, 84, 0, 0, 0, 0, 0, redone=2 * 2 + 3, faults=())
    assert verdict.is_exact


def edited(run: Path, rank: int, change: Callable[[list[Row]], None]) -> Verdict:
    path = run / FOLDER / f"{rank:04d}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return verify(run, SPEC)


def row_at(rows: list[Row], life: int, step: int) -> Row:
    return next(row for row in rows if (row["life"], row["step"]) == (life, step))


def test_a_lost_sample_is_named(run: Path) -> None:
    taken: list[Any] = []
    verdict = edited(run, 1, lambda rows: taken.append(row_at(rows, 1, 4)["samples"].pop()))
    assert (verdict.lost, verdict.duplicated, verdict.unplanned) == (1, 0, 0)
    slot, name, _, index, _ = taken[0]
    assert verdict.faults == (f"step 4: slot {slot} should have been {name}:{index}",)
    assert not verdict.is_exact


def test_what_a_later_life_undid_does_not_count(run: Path) -> None:
    verdict = edited(run, 1, lambda rows: row_at(rows, 0, 4)["samples"].clear())
    assert verdict.is_exact


def test_a_sample_taken_twice_is_named(run: Path) -> None:
    def again(rows: list[Row]) -> None:
        samples = row_at(rows, 1, 5)["samples"]
        samples.append(samples[0])

    verdict = edited(run, 2, again)
    assert verdict.lost == verdict.unplanned == 0 and verdict.duplicated >= 1
    assert any("once more than planned" in fault for fault in verdict.faults)
    assert any("2 times in one epoch" in fault for fault in verdict.faults)


def test_a_sample_in_the_place_of_another_is_named(run: Path) -> None:
    def swap(rows: list[Row]) -> None:
        row_at(rows, 0, 1)["samples"][0][3] += 1

    verdict = edited(run, 0, swap)
    assert verdict.lost == verdict.unplanned == 1
    assert not verdict.is_exact


def test_a_substitute_is_no_fault(run: Path) -> None:
    def other(rows: list[Row]) -> None:
        row_at(rows, 0, 1)["samples"][0][4] += 1

    verdict = edited(run, 0, other)
    assert verdict.is_exact and verdict.substituted == 1


def test_a_row_that_a_rank_did_not_write_is_named(run: Path) -> None:
    verdict = edited(run, 2, lambda rows: rows.remove(row_at(rows, 1, 6)))
    assert verdict.lost == 2 and not verdict.is_exact
    assert "step 6: rank 2 of life 1 wrote none" in verdict.faults


def test_steps_of_the_plan_that_were_passed_over_are_counted(tmp_path: Path) -> None:
    run = write(tmp_path, [(range(0, 5), 2, 0), (range(3, 7), 2, 4)], [0, 3])
    verdict = verify(run, SPEC)
    assert verdict.is_exact and verdict.passed_over == 4 and verdict.num_steps == 7


def test_another_plan_and_a_missing_beginning_are_told(tmp_path: Path, run: Path) -> None:
    path = run / FOLDER / LIVES
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2].replace(SPEC.fingerprint, "f" * 64)]) + "\n")
    assert "the data plan changed between starts" in verify(run, SPEC).faults[0]
    path.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(ConsumedError, match="begins at step 3"):
        verify(run, SPEC)
    path.unlink()
    with pytest.raises(ConsumedError, match="train with --ledger"):
        verify(run, SPEC)
