"""`kinodit config show | schema | diff`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kinodit.launch.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {name: mine, steps: 7}\noptim: {lr: 3e-4}\n")
    return path


def test_show_prints_the_whole_recipe_as_yaml(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", str(recipe), "run.seed=5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["run"]["steps"] == 7
    assert shown["run"]["seed"] == 5
    assert shown["optim"]["lr"] == 3e-4
    assert {"model", "data", "objective", "parallel", "checkpoint"} <= set(shown)


def test_what_show_prints_is_a_recipe_that_resolves_to_itself(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", str(recipe)]) == 0
    text = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(text)
    assert main(["config", "show", str(tmp_path)]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_of_the_repository_resolves(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", str(path)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["run"]["name"]


def test_every_recipe_is_in_the_table() -> None:
    table = (ROOT / "configs" / "README.md").read_text()
    recipes = [path.name for path in (ROOT / "configs").glob("*.yaml")]
    assert recipes
    assert [name for name in recipes if name not in table] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run.stepz=3"], ["stepz", "steps"]),
        (["run.steps=many"], ["run.steps", "many"]),
        (["run.steps=0"], ["run.steps=0"]),
        (["objective.name=vp"], ["vp", "rectified_flow"]),
        (["run.steps"], ["key=value"]),
    ],
)
def test_a_wrong_key_or_value_is_explained(
    arguments: list[str], words: list[str], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", str(recipe), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_a_missing_recipe_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read recipe" in capsys.readouterr().err


def test_schema_lists_keys_with_types_defaults_and_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "schema", "run"]) == 0
    out = capsys.readouterr().out
    assert "run.steps: int = 1000" in out
    assert "# " in out
    assert all(line.startswith(("run.", "#")) for line in out.splitlines() if line)
    assert main(["config", "schema", "run.steps"]) == 0
    assert capsys.readouterr().out.count("run.steps: ") == 1


def test_schema_of_an_unknown_section_names_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "schema", "rnu"]) == 2
    err = capsys.readouterr().err
    assert "'rnu'" in err and "optim" in err


def test_diff_shows_what_resolves_differently_and_nothing_else(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    # The same learning rate in other words; another seed; a default spelled out.
    other.write_text("run: {name: mine, steps: 7, seed: 2}\noptim: {lr: 0.0003}\n")
    assert main(["config", "diff", str(recipe), str(other)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["- run.seed: 0", "+ run.seed: 2"]
    assert main(["config", "diff", str(recipe), str(recipe)]) == 0
    assert capsys.readouterr().out == "no difference\n"
