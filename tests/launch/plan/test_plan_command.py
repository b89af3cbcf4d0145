"""`kinodit plan`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinodit.launch import cli
from kinodit.launch.plan.workload import Given, read_workload
from kinodit.models.errors import ConfigError
from kinodit.trainer.config import load_config
from kinodit.trainer.optim import optimizer_bytes
from tests.support.quick import quick
from tests.support.ranks import ROOT

TINY, LARGE = ROOT / "configs/t2v_tiny.yaml", ROOT / "configs/t2v_2b.yaml"


def test_a_recipe_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    arguments = [str(LARGE), "--gpus", "8", "--gpu-memory", "80", "--top", "2"]
    assert cli.main(["plan", *arguments, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    written = json.loads(out.read_text())
    best = written["layouts"][0]
    assert f"{best['memory_total'] / 2**30:.2f}" in shown
    assert sum(best["memory"].values()) == best["memory_total"]
    assert best["step_s"] == pytest.approx(sum(best["time_s"].values()))
    assert len(written["layouts"]) == 2 and written["num_fitting"] > 2
    assert "weights of the text encoder and the video codec count as 0" in shown
    assert "engine.compile" in shown


def test_what_does_not_fit_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(LARGE), "--gpus", "1", "--gpu-memory", "16", "--dry-run"]
    assert cli.main(["plan", *arguments]) == 1
    shown = capsys.readouterr().out
    assert "no layout fits" in shown and "need more memory; the closest" in shown
    assert "does not fit: needs" in shown and "there is no layout to try" in shown
    assert "autocast" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus 0, --gpus-per-node 8: must be at least 1"),
        (["--gpus", "2", "--codec", "4x8"], "--codec 4x8: four numbers are needed"),
        (["--gpus", "2", "--top", "0"], "--top 0: must be at least 1"),
        (["--gpus", "2", "--text-tokens", "0"], "--text-tokens 0: must be at least 1"),
        (["--gpus", "2", "--json", "/nowhere/plan.json"], "cannot write /nowhere/plan.json"),
    ],
)
def test_impossible_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(TINY), "--gpu-memory", "80", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_the_recipe_does_not_say_can_be_said() -> None:
    config = load_config(LARGE, [])
    plain = read_workload(config, Given())
    # 81 frames: 21 latents; 480 x 832 pixels: 30 x 52 tokens.
    assert plain.tokens["video"] == 21 * 30 * 52
    assert (plain.frozen.whole, plain.packs, plain.segments) == (0, 64, 1)
    given = read_workload(
        config, Given(codec=(8, 16, 16, 32), text_tokens=226, segments=3, encoder_gib=2.0)
    )
    # 11 latents of 15 x 26 tokens, whose channels the model's stream takes over.
    assert given.tokens == {"text": 226, "video": 11 * 15 * 26}
    assert given.model.streams["video"].in_channels == 4 * 32
    assert given.frozen.whole == 2 * 2**30 and given.segments == 3


def test_latents_that_do_not_divide_are_refused() -> None:
    config = load_config(LARGE, ["data.height=488"])
    with pytest.raises(ConfigError, match="do not divide into"):
        read_workload(config, Given())


def test_the_recipe_s_own_encoders_are_weighed() -> None:
    workload = read_workload(load_config(TINY, []), Given())
    assert workload.tokens == {"text": 16, "video": 16}
    # A MiniLM of 22.7 M parameters in float32.
    assert workload.frozen.whole == pytest.approx(4 * 22.7e6, rel=0.02)


@pytest.mark.parametrize("gpus", quick(["8", "1024"], "8"))
def test_a_dry_run_finds_what_was_planned(
    gpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to 1,024 ranks on one process, none of which has memory."""
    out = tmp_path / "plan.json"
    packs = [f"data.packs_per_step={gpus}", f"data.samples_per_step={gpus}"]
    arguments = [str(TINY), *packs, "--gpus", gpus, "--gpu-memory", "80", "--dry-run"]
    assert cli.main(["plan", *arguments, "--json", str(out)]) == 0
    dry = json.loads(out.read_text())["dry_run"]
    assert dry["ok"] and dry["world_size"] == int(gpus)
    assert dry["ranks"] == [0, int(gpus) - 1]
    exact = [check for check in dry["checks"] if not check["tolerance"]]
    assert len(exact) == 9
    assert all(check["planned"] == check["found"] for check in exact)
    (peak,) = [check for check in dry["checks"] if "activations" in check["name"]]
    assert peak["found"] > 0
    assert "in 0.0 s" not in capsys.readouterr().out


def test_a_dry_run_tells_what_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan that forgets one of Adam's moments is found out."""
    monkeypatch.setattr(
        "kinodit.launch.plan.state.optimizer_bytes",
        lambda config, parts, item: optimizer_bytes(config, parts, item) // 2,
    )
    arguments = [str(TINY), "--gpus", "2", "--gpu-memory", "80", "--dry-run"]
    assert cli.main(["plan", *arguments]) == 1
    differing = [line for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line]
    assert len(differing) == 2 and all("optimizer" in line for line in differing)


def test_weights_that_are_split_or_brought_count_as_such() -> None:
    layers, text = 6, "modalities.text.encoder."
    plain = read_workload(load_config(TINY, []), Given()).frozen
    assert plain.on_rank(8, 8, 0) == plain.on_rank(1, 8, 10**12) == plain.whole

    brought = read_workload(load_config(TINY, [f"{text}offload=true"]), Given()).frozen
    assert (brought.whole, brought.offloaded) == (0, plain.whole)
    # They are there before the activations are, and in their place.
    assert brought.on_rank(8, 8, 0) == plain.whole and brought.on_rank(8, 8, plain.whole) == 0
    assert brought.on_rank(8, 8, plain.whole // 2) == plain.whole - plain.whole // 2

    split = read_workload(load_config(TINY, [f"{text}shard=true"]), Given()).frozen
    assert (split.whole, split.split) == (0, plain.whole)
    many = 10**12
    assert split.on_rank(1, 8, 0) == plain.whole
    assert split.on_rank(16, 8, many) == -(-plain.whole // 8)
    assert split.on_rank(16, 1, many) == -(-plain.whole // 16)
    # MiniLM: its table of tokens is larger than any of its blocks.
    table = 4 * 30522 * 384
    assert split.gathered == 2 * table > 2 * (plain.whole - table) // layers
    assert split.on_rank(16, 8, 0) == split.on_rank(16, 8, many) + split.gathered
    config = load_config(TINY, [f"{text}shard=true", "modalities.shard_ranks=2"])
    assert read_workload(config, Given()).frozen.on_rank(16, 8, many) == -(-plain.whole // 2)
