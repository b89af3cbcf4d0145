"""A run that goes on at other numbers of ranks, split otherwise, is the run of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.resume.journeys import Legs, assert_as_alone, travel, undisturbed
from tests.support.quick import quick
from tests.support.ranks import Ranks

pytestmark = pytest.mark.gloo

JOURNEYS: dict[str, Legs] = {
    "2-3-1": ((2, ()), (3, ()), (1, ())),
    "4-2-3-1": ((4, ()), (2, ()), (3, ()), (1, ())),
    "tp2-tp1": ((2, ("parallel.tp=2",)), (2, ())),
    "tp2-alone": ((2, ("parallel.tp=2",)), (1, ())),
    "cp1-cp2": ((2, ()), (2, ("parallel.cp=2",))),
    "alone-cp2-alone": ((1, ()), (2, ("parallel.cp=2",)), (1, ())),
    "shard-replicate": ((2, ()), (2, ("parallel.dp_replicate=2",))),
    "tp2-alone-encoding-shared": (
        (2, ("parallel.tp=2", "modalities.share_encoding=true")),
        (1, ()),
    ),
    "tp2-cp2": ((2, ("parallel.tp=2",)), (2, ("parallel.cp=2", "parallel.ring=2"))),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("elastic"))


@pytest.mark.parametrize("name", quick(JOURNEYS, "2-3-1", "alone-cp2-alone"))
def test_every_leg_goes_on_exactly(name: str, recipe: Path, groups: dict[int, Ranks]) -> None:
    travel(recipe, name, JOURNEYS[name], groups)
    assert_as_alone(recipe, name)
