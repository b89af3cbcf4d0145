"""Batch scripts for Slurm, rendered from a recipe, a cluster's facts and a template.

What is rendered ends up in three grammars, and each has its own gate, so that no value can become
a directive, a command or a second line: `#SBATCH` values pass an allow-list, words of the script
are shell-quoted, and control characters are refused everywhere. Credentials are refused, never
rendered: a batch script is kept by the scheduler and readable by others.
"""

from __future__ import annotations

import difflib
import re
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from kinodit.models.errors import ConfigError, UserError
from kinodit.trainer.config import load_config
from kinodit.trainer.redact import is_secret_name, redact_text

TEMPLATE = "train.sh.j2"

_DIRECTIVE = re.compile(r"[A-Za-z0-9_.,:/%@+&|()\[\]*=-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CLUSTER_NAME = re.compile(r"[a-z0-9_-]+")


class SlurmError(UserError):
    """A value that may not stand in a batch script, or an unknown cluster."""


@dataclass(frozen=True)
class ClusterConfig:
    """What a cluster is like: the part of a batch script that no recipe knows.

    gpus_per_node:    GPUs to ask for on each node; one process is started for each. 0: none
    processes_per_node: processes on each node; 0: as many as GPUs
    cpus_per_process: cores for each process (decoding runs beside the training thread)
    partition, account, qos, constraint: as sbatch takes them; "" leaves the line out
    memory:           per node, as sbatch writes it ("0" is all of it, "" the cluster's default)
    time:             time limit, as sbatch writes it ("24:00:00", "2-00:00:00")
    signal_lead_s:    seconds before the time limit at which the run is told to stop
    max_restarts:     how often the job may put itself back into the queue
    python:           interpreter, relative to the folder that the job is submitted from
    setup:            shell lines of the cluster's owner, run before Python ("module load cuda")
    environment:      variables of every process (network interfaces, NCCL); never credentials
    """

    gpus_per_node: int = 8
    processes_per_node: int = 0
    cpus_per_process: int = 8
    memory: str = "0"
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    signal_lead_s: int = 120
    max_restarts: int = 100
    python: str = ".venv/bin/python"
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gpus_per_node < 0 or self.processes_per_node < 0 or self.tasks_per_node < 1:
            raise ConfigError(
                f"gpus_per_node={self.gpus_per_node}, processes_per_node="
                f"{self.processes_per_node}: at least one process must run on each node"
            )
        if self.cpus_per_process < 1:
            raise ConfigError(f"cpus_per_process={self.cpus_per_process}: must be at least 1")
        if self.signal_lead_s < 1 or self.max_restarts < 0:
            raise ConfigError(
                f"signal_lead_s={self.signal_lead_s}, max_restarts={self.max_restarts}: must be "
                "at least 1 and at least 0"
            )
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                raise ConfigError(f"environment: {name!r} is not the name of a variable")
            if is_secret_name(name):
                raise ConfigError(
                    f"environment: {name} looks like a credential, and batch scripts are readable "
                    "by others: export it in the shell that calls sbatch, which passes it on"
                )

    @property
    def tasks_per_node(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or self.gpus_per_node


@dataclass(frozen=True)
class Job:
    """What to train, where: the command that the script runs, and the one that rendered it."""

    name: str
    run_folder: Path
    config_path: Path
    overrides: tuple[str, ...]
    cluster_name: str
    num_nodes: int
    script: Path | None


def load_cluster(name: str) -> ClusterConfig:
    """The cluster file `name`: a path to YAML, or the name of one in slurm/clusters/.

    Raises:
        SlurmError: there is no such file.
        ConfigError: a key or a value does not fit `ClusterConfig`.
    """
    shipped = files("kinodit") / "slurm" / "clusters"
    if _CLUSTER_NAME.fullmatch(name):
        source = shipped / f"{name}.yaml"
        known = sorted(file.name[:-5] for file in shipped.iterdir() if file.name.endswith(".yaml"))
        if not source.is_file():
            raise SlurmError(
                f"no cluster {name!r} in slurm/clusters; there is {', '.join(known)}, or give "
                "the path of a YAML file"
            )
        text = source.read_text()
    else:
        try:
            text = Path(name).read_text()
        except OSError as error:
            raise SlurmError(f"cannot read cluster file {name}: {error.strerror}") from error
    try:
        facts = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cluster {name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"cluster {name} holds a {type(facts).__name__}, not a mapping")
    try:
        return _cluster(facts)
    except ConfigError as error:
        raise ConfigError(f"cluster {name}: {error}") from error


def _cluster(facts: dict[str, Any]) -> ClusterConfig:
    """`facts` as a `ClusterConfig`. Not by OmegaConf: "${HOME}" is the shell's to expand here."""
    default = vars(ClusterConfig())
    for key, value in facts.items():
        if key not in default:
            near = difflib.get_close_matches(str(key), default, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(default)}"
            raise ConfigError(f"unknown key {key!r}: {hint}")
        kind = type(default[key])
        # Exactly: bool is an int, and YAML reads 1:30:00 without quotes as a number of seconds.
        if type(value) is not kind:
            raise ConfigError(
                f"{key}={value!r} is of type {type(value).__name__}, not {kind.__name__}"
                + ("; put it in quotes" if kind is str else "")
            )
        items = value if kind is list else [*value, *value.values()] if kind is dict else []
        for item in items:
            if not isinstance(item, str):
                raise ConfigError(f"{key}: {item!r} is not a string; put it in quotes")
    return ClusterConfig(**facts)


def one_line(value: object) -> str:
    """`value` unchanged, if it can stand on one line and reads as what it is.

    Raises:
        SlurmError: it holds a control or format character, which could end the line it stands on
            or make it read as something else.
    """
    text = str(value)
    for character in text:
        if unicodedata.category(character) in {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}:
            raise SlurmError(
                f"{text!r} holds the character {character!r}, which may not stand in a script"
            )
    return text


def quote(value: object) -> str:
    """`value` as one shell word; refuses what `one_line` refuses."""
    return shlex.quote(one_line(value))


def directive(value: object) -> str:
    """`value` as the value of a `#SBATCH` line.

    Raises:
        SlurmError: it holds anything but letters, digits and the punctuation sbatch knows.
    """
    text = str(value)
    if not _DIRECTIVE.fullmatch(text):
        raise SlurmError(
            f"{text!r} may not stand in an #SBATCH line: letters, digits and _.,:/%@+&|()[]*=- only"
        )
    return text


def render(
    config_path: Path,
    overrides: Sequence[str],
    cluster_name: str,
    num_nodes: int,
    script: Path | None = None,
) -> str:
    """The batch script that trains a recipe on `num_nodes` nodes of a cluster.

    `script` is where it will be written; the script's head says so.

    Raises:
        ConfigError: the recipe or the cluster file does not fit, or their world size does not.
        SlurmError: a value may not stand in a batch script.
    """
    if num_nodes < 1:
        raise SlurmError(f"--nodes {num_nodes}: must be at least 1")
    cluster = load_cluster(cluster_name)
    config = load_config(config_path, overrides)
    config.parallel.resolve(num_nodes * cluster.tasks_per_node)
    job = Job(
        name=config.run.name,
        run_folder=config.run.folder,
        config_path=config_path,
        overrides=tuple(overrides),
        cluster_name=cluster_name,
        num_nodes=num_nodes,
        script=script,
    )
    return fill(job, cluster)


def fill(job: Job, cluster: ClusterConfig) -> str:
    """The template with the facts of one job and one cluster.

    Raises:
        SlurmError: a value may not stand in a batch script.
    """
    for text in (*job.overrides, *cluster.setup, *cluster.environment.values()):
        if redact_text(text) != text:
            raise SlurmError(
                "a credential may not be rendered into a batch script, which others can read: "
                f"export it in the shell that calls sbatch ({redact_text(text)})"
            )
    return _template().render(job=job, cluster=cluster)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Shell, not HTML: the filters are the gates.
        autoescape=False,
    )
    environment.filters |= {"q": quote, "line": one_line, "directive": directive}
    source = files("kinodit") / "slurm" / "templates" / TEMPLATE
    return environment.from_string(source.read_text())
