"""What a rendered batch script says, whatever is put into it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinodit.launch.slurm import (
    ClusterConfig,
    Job,
    SlurmError,
    directive,
    fill,
    load_cluster,
    quote,
    render,
)
from kinodit.models.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted(path.stem for path in (ROOT / "slurm" / "clusters").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOB = Job(
    name="t2v",
    run_folder=Path("runs/t2v"),
    config_path=Path("configs/t2v.yaml"),
    overrides=("optim.lr=1e-4",),
    cluster_name="generic",
    num_nodes=2,
    script=Path("slurm/train.sh"),
)
HOSTILE = [
    "x\n#SBATCH --partition=other",
    "x\r\nrm -rf ~",
    "$(touch owned)",
    "`touch owned`",
    "'; touch owned; '",
    '"; touch owned; "',
    "a b",
    "x && touch owned",
    "$HOME",
    "\\",
    "\u2028touch owned",
    "\u202emoc.lufmrah",
    "\x00",
    "\x1b[2K",
    "{{ 7 * 7 }}",
    "-rf",
]
hostile_text = st.one_of(
    st.sampled_from(HOSTILE), st.text(max_size=30), st.text("ab=$`'\"\\;&|<>()\n\r\t {}#%!*?~-")
)


def training_command(script: str) -> list[str]:
    """The words that srun is given, as a shell reads them."""
    joined = script.replace("\\\n", " ")
    (line,) = (line for line in joined.splitlines() if line.startswith("srun "))
    return shlex.split(line.removesuffix("&"))


def directives(script: str) -> list[str]:
    return [
        line.split("=")[0] for line in script.splitlines() if line.lstrip().startswith("#SBATCH")
    ]


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_gives_a_script_that_bash_and_shellcheck_accept(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "train.sh"
    path.write_text(fill(JOB, load_cluster(name)))
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_committed_script_is_what_its_own_head_renders(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = re.findall(r"^#   kinodit slurm render (.*)$", path.read_text(), re.MULTILINE)
    words = shlex.split(command)
    options = {name: words[words.index(name) + 1] for name in ("--cluster", "--nodes", "--out")}
    recipe, *overrides = words[: words.index("--cluster")]
    assert options["--out"] == path.relative_to(ROOT).as_posix()
    rendered = render(
        Path(recipe),
        overrides,
        options["--cluster"],
        int(options["--nodes"]),
        Path(options["--out"]),
    )
    assert path.read_text() == rendered
    assert os.access(path, os.X_OK)


def test_train_t2v_is_committed() -> None:
    assert "train_t2v.sh" in [path.name for path in SCRIPTS]


def test_directives_stand_before_the_first_command() -> None:
    lines = fill(JOB, load_cluster("generic")).splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    assert "#SBATCH --signal=B:USR1@120" in lines[:first]


def test_script_never_traces_its_commands() -> None:
    for name in CLUSTERS:
        script = fill(JOB, load_cluster(name))
        assert not re.search(r"set\s+-\w*[xv]|xtrace|verbose", script)


@pytest.mark.parametrize("part", ["config_path", "overrides", "run_folder", "script"])
@settings(max_examples=60, deadline=None)
@given(text=hostile_text)
def test_words_stay_single_words(part: str, text: str) -> None:
    value: Any = Path(text) if part != "overrides" else (text,)
    job = replace(JOB, **{part: value})
    clean = fill(JOB, ClusterConfig())
    try:
        script = fill(job, ClusterConfig())
    except SlurmError:
        return
    assert len(script.splitlines()) == len(clean.splitlines())
    assert directives(script) == directives(clean)
    *_, recipe, override = training_command(script)
    assert recipe == str(job.config_path)
    assert override == job.overrides[0]


@settings(max_examples=100, deadline=None)
@given(text=hostile_text)
def test_a_quoted_word_reaches_the_program_unchanged(text: str) -> None:
    try:
        word = quote(text)
    except SlurmError:
        assert not text.isprintable()
        return
    said = subprocess.run(
        ["bash", "-c", f"printf %s {word}"], capture_output=True, check=True, text=True
    )
    assert said.stdout == text


@pytest.mark.parametrize("key", ["memory", "time", "partition", "account", "qos", "constraint"])
@settings(max_examples=60, deadline=None)
@given(text=hostile_text)
def test_directive_values_add_no_directive(key: str, text: str) -> None:
    plain: Any = {key: "x"}
    hostile: Any = {key: text}
    try:
        script = fill(JOB, ClusterConfig(**hostile))
    except SlurmError:
        return
    kept = directives(fill(JOB, ClusterConfig(**plain)))
    assert len(directives(script)) == len(kept) - (not text)


@pytest.mark.parametrize("text", [text for text in HOSTILE if text != "-rf"])
def test_directives_refuse_hostile_values(text: str) -> None:
    with pytest.raises(SlurmError, match="may not stand"):
        directive(text)


@settings(max_examples=60, deadline=None)
@given(text=hostile_text)
def test_environment_values_reach_the_processes_unchanged(text: str) -> None:
    try:
        script = fill(JOB, ClusterConfig(environment={"NCCL_DEBUG": text}))
    except SlurmError:
        return
    (line,) = (line for line in script.splitlines() if line.startswith("export NCCL_DEBUG="))
    assert shlex.split(line) == ["export", f"NCCL_DEBUG={text}"]


@pytest.mark.parametrize(
    "cluster",
    [
        {"environment": {"WANDB_API_KEY": "canary"}},
        {"environment": {"HF_TOKEN": "canary"}},
        {"setup": ["export AWS_SECRET_ACCESS_KEY=canary"]},
        {"environment": {"PROXY": "https://me:canary@proxy/"}},
    ],
)
def test_credentials_are_refused_and_not_repeated(cluster: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="export it in the shell that calls sbatch") as caught:
        fill(JOB, ClusterConfig(**cluster))
    assert "canary" not in str(caught.value)


def test_a_credential_among_the_overrides_is_refused() -> None:
    with pytest.raises(SlurmError, match="credential") as caught:
        fill(replace(JOB, overrides=("log.api_key=canary",)), ClusterConfig())
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus_per_nod: 8", "unknown key 'gpus_per_nod': did you mean 'gpus_per_node'?"),
        ("colour: red", "there is gpus_per_node"),
        ("time: 1:30:00", "time=5400 is of type int, not str; put it in quotes"),
        ("environment: {NCCL_DEBUG: 1}", "environment: 1 is not a string"),
        ("setup: module load cuda", "not list"),
        ("gpus_per_node: many", "many"),
        ("gpus_per_node: 0", "at least one process"),
        ("cpus_per_process: 0", "cpus_per_process=0"),
        ("environment: {'A B': x}", "not the name of a variable"),
        ("max_restarts: -1", "max_restarts=-1"),
        ("- a list", "holds a list"),
        ("{", "is not YAML"),
    ],
)
def test_a_cluster_file_that_does_not_fit_is_explained(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_cluster(str(path))
    assert "\n" not in str(caught.value)


def test_the_shell_not_the_loader_expands_variables_in_setup_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("setup: ['export CACHE=${HOME}/cache']")
    assert "\nexport CACHE=${HOME}/cache\n" in fill(JOB, load_cluster(str(path)))


def test_an_unknown_cluster_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match="there is cpu, generic"):
        load_cluster("genric")
    with pytest.raises(SlurmError, match="cannot read cluster file"):
        load_cluster(str(tmp_path / "none.yaml"))


def test_every_key_of_a_cluster_is_described() -> None:
    text = ClusterConfig.__doc__ or ""
    plain = {"partition", "account", "qos", "constraint"}
    assert [
        f.name for f in fields(ClusterConfig) if f.name not in text and f.name not in plain
    ] == []
