"""What may be different on a resume, what may not, and that both are said."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinodit.data.chosen import Chosen
from kinodit.data.spec import DatasetSpec, PlanSpec
from kinodit.trainer.checkpoint import Manifest
from kinodit.trainer.config import load_config
from kinodit.trainer.drift import acceptance, code_digests, drift, facts, plan_parts
from kinodit.trainer.state import CheckpointError, TrainState
from tests.support.ranks import ROOT

RECIPE = ROOT / "configs" / "t2v_tiny.yaml"
STATE = TrainState(7, 70, 700, "a" * 64)


def made_by(*overrides: str, world_size: int = 2) -> dict[str, Any]:
    return facts(load_config(RECIPE, overrides), world_size)


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    return made_by()


def test_nothing_differs_from_itself(saved: dict[str, Any]) -> None:
    assert drift(saved, made_by()) == ([], [])


@pytest.mark.parametrize(
    "change", ["model.num_double_blocks=4", "data.samples_per_step=32", "optim.lr=0.5"]
)
def test_what_changes_the_curve_is_refused(change: str, saved: dict[str, Any]) -> None:
    refused, listed = drift(saved, made_by(change))
    assert listed == []
    key, _, value = change.partition("=")
    (said,) = [words for words in refused if words.startswith(f"{key}: was ")]
    assert said.endswith(f", is {value}")


@pytest.mark.parametrize(
    "change", ["run.name=other", "log.every_steps=3", "checkpoint.keep_last=9"]
)
def test_what_does_not_is_listed(change: str, saved: dict[str, Any]) -> None:
    refused, listed = drift(saved, made_by(change))
    assert refused == []
    assert len(listed) == 1 and listed[0].startswith(change.split("=")[0])


def test_a_key_that_came_later_counts_where_it_is_set(saved: dict[str, Any]) -> None:
    older = copy.deepcopy(saved)
    del older["config"]["optim"]["eps"], older["config"]["tasks"]
    del older["config"]["data"]["datasets"]["theatre"]["max_epochs"]
    assert drift(older, made_by()) == ([], [])
    refused, _ = drift(older, made_by("optim.eps=1e-3", "data.datasets.theatre.max_epochs=9"))
    assert sorted(refused) == [
        "data.datasets.theatre.max_epochs: was None, is 9.0",
        "optim.eps: was None, is 0.001",
    ]
    newer = copy.deepcopy(saved)
    newer["config"]["optim"]["gone"] = 1
    assert drift(newer, made_by())[0] == ["optim.gone: was 1, is None"]


def test_layout_versions_and_code_are_listed(saved: dict[str, Any]) -> None:
    now = copy.deepcopy(made_by("parallel.dp_replicate=2", world_size=4))
    now["versions"]["torch"] = "9.9"
    for name in sorted(now["code"])[:5]:
        now["code"][name] = "0" * 16
    refused, listed = drift(saved, now)
    assert refused == []
    assert "mesh world_size: was 2, is 4" in listed
    assert [words for words in listed if words.startswith("versions torch: was ")]
    (code,) = [words for words in listed if words.startswith("code that decides gradients changed")]
    assert code.endswith(" and 2 more")


def test_digests_are_of_what_decides_gradients() -> None:
    digests = code_digests()
    assert {"trainer/step.py", "trainer/ema.py", "models/mmdit.py"} <= set(digests)
    assert not [name for name in digests if name.startswith(("launch/", "data/"))]


def ask(
    saved: dict[str, Any], now: dict[str, Any], plan: str, *, accept_drift: bool
) -> tuple[TrainState, list[str]]:
    said: list[str] = []
    accept = acceptance(now, plan, accept_drift, said.append)
    state = accept(Path("step-00000007"), STATE, Manifest(7, {}, saved))
    return state, said


def test_a_refusal_names_every_difference_and_the_ways_out(saved: dict[str, Any]) -> None:
    now = made_by("model.num_double_blocks=4", "optim.lr=0.5")
    with pytest.raises(CheckpointError) as error:
        ask(saved, now, "b" * 64, accept_drift=False)
    for words in (
        "step-00000007 was trained otherwise",
        "model.num_double_blocks: was 3, is 4",
        "optim.lr: was 0.003, is 0.5",
        "the data plan: was aaaaaaaaaaaa, is bbbbbbbbbbbb",
        "checkpoint.accept_drift=true",
    ):
        assert words in str(error.value)


def test_a_plan_that_changed_says_what_of_it(saved: dict[str, Any]) -> None:
    part = DatasetSpec("clips", "c" * 64, 9, eligible=Chosen.of(np.arange(7)))
    spec = PlanSpec((part, DatasetSpec("stills", "d" * 64, 5)), 4, 2, seed=1)
    other = replace(part, content_hash="e" * 64, eligible=Chosen.of(np.arange(6)))
    changed = replace(spec, datasets=(other, spec.datasets[1]), seed=2)
    before = {**saved, "plan": plan_parts(spec)}
    now = {**saved, "plan": plan_parts(changed)}
    state = replace(STATE, plan=spec.fingerprint)
    accept = acceptance(now, changed.fingerprint, False, lambda _: None)
    with pytest.raises(CheckpointError) as error:
        accept(Path("step-00000007"), state, Manifest(7, {}, before))
    said = str(error.value)
    assert "datasets.clips.content_hash: was cccccccccccc..., is eeeeeeeeeeee..." in said
    assert "datasets.clips.eligible: was" in said and "seed: was 1, is 2" in said
    assert "stills" not in said
    same = acceptance(before, spec.fingerprint, False, lambda _: None)
    assert same(Path("step-00000007"), state, Manifest(7, {}, before)) == state
    # What a resume has to know of the data fits on a page.
    assert len(json.dumps(before["plan"])) + len(state.to_json()) < 4096


def test_an_explicit_word_lets_it_pass_and_lists_it(saved: dict[str, Any]) -> None:
    now = made_by("optim.lr=0.5")
    state, said = ask(saved, now, "b" * 64, accept_drift=True)
    assert state == replace(STATE, plan="b" * 64)
    assert len(said) == 2
    assert all(words.startswith("resumed from step-00000007 with a difference: ") for words in said)


def test_what_is_harmless_passes_and_is_listed(saved: dict[str, Any]) -> None:
    state, said = ask(saved, made_by("log.every_steps=3"), STATE.plan, accept_drift=False)
    assert state == STATE
    assert said == ["resumed from step-00000007 with a difference: log.every_steps: was 50, is 3"]
