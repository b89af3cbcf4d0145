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

from kinodit.launch.cli import main
from kinodit.launch.slurm.cluster import ClusterConfig, load_cluster
from kinodit.launch.slurm.quoting import SlurmError, directive, option, quote
from kinodit.launch.slurm.render import TEMPLATES, Job, fill, training_job
from kinodit.models.errors import UserError

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted(path.stem for path in (ROOT / "slurm" / "clusters").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOB = Job(
    template="train",
    name="t2v",
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


def recipe_words(script: str) -> list[str]:
    """The recipe and its overrides, as a shell reads them."""
    (path,) = (line for line in script.splitlines() if line.startswith("recipe=("))
    (overrides,) = (line for line in script.splitlines() if line.startswith("recipe+=("))
    words = [shlex.split(line.split("(", 1)[1].removesuffix(")")) for line in (path, overrides)]
    assert words[1].pop() == "$@"
    return words[0] + words[1]


def directives(script: str) -> list[str]:
    return [
        line.split("=")[0] for line in script.splitlines() if line.lstrip().startswith("#SBATCH")
    ]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "torchrun": {"launcher": "torchrun"},
    "pyxis": {"container": "image.sqsh", "container_mounts": ["/data:/data", "/a b:/c"]},
    "apptainer": {"container": "image.sif", "container_runtime": "apptainer"},
    "unchecked": {"check": False, "setup": ["module load cuda"], "account": "video"},
}
"""Cluster files whose scripts take other branches of the templates."""


def every_script() -> dict[str, str]:
    """A script for every template, cluster and variant."""
    clusters = {name: load_cluster(name) for name in CLUSTERS}
    for name, changes in VARIANTS.items():
        clusters[name] = ClusterConfig(**changes)
    return {
        f"{template} {name}": fill(replace(JOB, template=template), cluster)
        for template in TEMPLATES
        for name, cluster in clusters.items()
    }


def test_bash_and_shellcheck_accept_every_script(tmp_path: Path) -> None:
    paths = []
    for name, script in every_script().items():
        paths.append(tmp_path / f"{name.replace(' ', '-')}.sh")
        paths[-1].write_text(script)
        subprocess.run(["bash", "-n", paths[-1]], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, *paths], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_committed_script_is_what_its_own_head_renders(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = re.findall(r"^#   kinodit (slurm render .*)$", path.read_text(), re.MULTILINE)
    words = shlex.split(command)
    assert words[-2:] == ["--out", path.relative_to(ROOT).as_posix()]
    # Written elsewhere, and the head still names the script's own place.
    other = training_job if "--template" not in words else None
    assert main(words[:-2]) == 0
    printed = capsys.readouterr().out
    committed = path.read_text()
    assert printed.replace("SCRIPT", words[-1]) == committed.replace(f" --out {words[-1]}", "")
    assert other is None or "recipe=(" in committed
    assert os.access(path, os.X_OK)


def test_the_scripts_that_the_documents_name_are_committed() -> None:
    assert [path.name for path in SCRIPTS] == [
        "encode.sh",
        "evaluate.sh",
        "train_av.sh",
        "train_t2v.sh",
        "validate.sh",
        "validate_summary.sh",
    ]


def test_nothing_that_sbatch_can_override_is_in_the_body() -> None:
    """Values that no default of this script's could be: they stand in #SBATCH lines alone."""
    cluster = ClusterConfig(
        gpus_per_node=731, cpus_per_process=733, time="7:39:00", memory="743G", signal_lead_s=751
    )
    script = fill(replace(JOB, num_nodes=757), cluster)
    body = "\n".join(line for line in script.splitlines() if not line.startswith("#"))
    assert not re.findall("731|733|7:39|743|751|757", body)
    for line in ("--nodes=757", "--gpus-per-node=731", "--cpus-per-gpu=733", "--time=7:39:00"):
        assert f"#SBATCH {line}\n" in script
    assert "--nodes" not in " ".join(directives(fill(replace(JOB, num_nodes=0), cluster)))


def test_directives_stand_before_the_first_command() -> None:
    for name, script in every_script().items():
        lines = script.splitlines()
        first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        assert not any("#SBATCH" in line for line in lines[first:]), name
        assert any(line.startswith("#SBATCH --job-name=") for line in lines[:first]), name
    assert "#SBATCH --signal=B:USR1@180\n" in fill(JOB, ClusterConfig())


def test_scripts_never_trace_their_commands() -> None:
    for script in every_script().values():
        assert not re.search(r"set\s+-\w*[xv]|xtrace|verbose", script)


@pytest.mark.parametrize("part", ["config_path", "overrides", "script", "cluster_name"])
@settings(max_examples=60, deadline=None)
@given(text=hostile_text)
def test_words_stay_single_words(part: str, text: str) -> None:
    value: Any = {"overrides": (text,), "cluster_name": text}.get(part, Path(text))
    job = replace(JOB, **{part: value})
    clean = fill(JOB, ClusterConfig())
    try:
        script = fill(job, ClusterConfig())
    except SlurmError:
        return
    assert len(script.splitlines()) == len(clean.splitlines())
    assert directives(script) == directives(clean)
    assert recipe_words(script) == [str(job.config_path), *job.overrides]


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


@settings(max_examples=100, deadline=None)
@given(text=hostile_text)
def test_job_names_add_no_directive(text: str) -> None:
    try:
        script = fill(replace(JOB, name=text), ClusterConfig())
    except SlurmError:
        return
    assert directives(script) == directives(fill(JOB, ClusterConfig()))
    assert f"#SBATCH --job-name={text}\n" in script


@settings(max_examples=100, deadline=None)
@given(text=hostile_text)
def test_options_of_a_cluster_are_options(text: str) -> None:
    hostile: Any = {"sbatch_options": [f"--{text}"]}
    try:
        script = fill(JOB, ClusterConfig(**hostile))
    except SlurmError:
        return
    assert len(directives(script)) == len(directives(fill(JOB, ClusterConfig()))) + 1
    assert shlex.split(f"--{text}".replace("#", "x")) == [f"--{text}".replace("#", "x")]


@pytest.mark.parametrize("key", ["container", "container_mounts", "python"])
@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
@settings(max_examples=40, deadline=None)
@given(text=hostile_text)
def test_containers_stay_words(key: str, runtime: str, text: str) -> None:
    hostile: Any = {"container": "image", "container_runtime": runtime}
    hostile[key] = [text] if key == "container_mounts" else text
    plain: Any = {**hostile, key: ["a:b"] if key == "container_mounts" else "x"}
    try:
        script = fill(JOB, ClusterConfig(**hostile))
    except SlurmError:
        return
    if text or key != "container":
        kept = fill(JOB, ClusterConfig(**plain))
        assert len(script.splitlines()) == len(kept.splitlines())
    done = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["", "-p main", "--", "--wrap=a b", "--x=$(id)", "x", "--A"])
def test_options_refuse_what_is_none(text: str) -> None:
    with pytest.raises(SlurmError, match="is not an option"):
        option(text)


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
        {"container": "docker://me:canary@registry/image"},
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
        ("processes_per_node: 0", "at least one process"),
        ("cpus_per_process: 0", "cpus_per_process=0"),
        ("environment: {'A B': x}", "not the name of a variable"),
        ("max_restarts: -1", "max_restarts=-1"),
        ("launcher: mpirun", "there is srun, torchrun"),
        ("container_runtime: docker", "there is pyxis, apptainer"),
        ("sbatch_options: [--a b]", "is not an option"),
        ("- a list", "holds a list"),
        ("{", "is not YAML"),
    ],
)
def test_a_cluster_file_that_does_not_fit_is_explained(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_cluster(str(path))
    assert "\n" not in str(caught.value)


def test_the_shell_not_the_loader_expands_variables_in_setup_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("setup: ['export CACHE=${HOME}/cache']")
    assert "\nexport CACHE=${HOME}/cache\n" in fill(JOB, load_cluster(str(path)))


def test_an_unknown_cluster_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match="there is cpu, efa, generic, infiniband"):
        load_cluster("genric")
    with pytest.raises(SlurmError, match="cannot read cluster file"):
        load_cluster(str(tmp_path / "none.yaml"))


def test_every_key_of_a_cluster_is_described() -> None:
    text = ClusterConfig.__doc__ or ""
    plain = {"partition", "account", "qos", "constraint"}
    assert [
        f.name for f in fields(ClusterConfig) if f.name not in text and f.name not in plain
    ] == []
