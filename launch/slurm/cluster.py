"""A cluster's facts: the part of a batch script that no recipe knows.

Credentials are refused, never rendered: a batch script is kept by the scheduler and readable by
others.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from kinodit.launch.slurm.quoting import SlurmError, option
from kinodit.models.errors import ConfigError
from kinodit.trainer.redact import is_secret_name, redact_text

LAUNCHERS = ("srun", "torchrun")
RUNTIMES = ("pyxis", "apptainer")

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CLUSTER_NAME = re.compile(r"[a-z0-9_-]+")


@dataclass(frozen=True)
class ClusterConfig:
    """What a cluster is like. What stands in `#SBATCH` lines, sbatch's own options override.

    gpus_per_node:    GPUs to ask for on each node; one process is started for each. 0: none
    processes_per_node: processes on each node of a cluster without GPUs
    cpus_per_process: cores for each process (decoding runs beside the training thread)
    partition, account, qos, constraint: as sbatch takes them; "" leaves the line out
    memory:           per node, as sbatch writes it ("0" is all of it, "" the cluster's default)
    time:             time limit, as sbatch writes it ("24:00:00", "2-00:00:00")
    sbatch_options:   further options, each "--name" or "--name=value"
    signal_lead_s:    seconds before the time limit at which the run is told to save; twice what a
                      save takes, and a minute, since Slurm's own timer is coarse
    max_restarts:     how often the job may put itself back into the queue
    max_stalled_restarts: restarts in a row, in the queue or in place, without a new checkpoint
    check:            run `kinodit doctor` on every node before each start
    launcher:         "srun" starts every process; "torchrun" one agent on each node
    python:           interpreter, relative to the folder that the job is submitted from
    container:        image that processes run in; "" for none
    container_runtime: "pyxis" (options of srun) or "apptainer" (a command)
    container_mounts: further "SOURCE:TARGET" to mount; the folder of the job always is
    setup:            shell lines of the cluster's owner, run before Python ("module load cuda")
    environment:      variables of every process (network interfaces, NCCL); never credentials
    """

    gpus_per_node: int = 8
    processes_per_node: int = 1
    cpus_per_process: int = 8
    memory: str = "0"
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    sbatch_options: list[str] = field(default_factory=list)
    signal_lead_s: int = 180
    max_restarts: int = 1000
    max_stalled_restarts: int = 3
    check: bool = True
    launcher: str = "srun"
    python: str = ".venv/bin/python"
    container: str = ""
    container_runtime: str = "pyxis"
    container_mounts: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gpus_per_node < 0 or self.processes_per_node < 1:
            raise ConfigError(
                f"gpus_per_node={self.gpus_per_node}, processes_per_node="
                f"{self.processes_per_node}: at least one process must run on each node"
            )
        if self.cpus_per_process < 1:
            raise ConfigError(f"cpus_per_process={self.cpus_per_process}: must be at least 1")
        if self.signal_lead_s < 1 or min(self.max_restarts, self.max_stalled_restarts) < 0:
            raise ConfigError(
                f"signal_lead_s={self.signal_lead_s}, max_restarts={self.max_restarts}, "
                f"max_stalled_restarts={self.max_stalled_restarts}: must be at least 1, 0 and 0"
            )
        for key, value, known in (
            ("launcher", self.launcher, LAUNCHERS),
            ("container_runtime", self.container_runtime, RUNTIMES),
        ):
            if value not in known:
                raise ConfigError(f"{key}={value!r}: there is {', '.join(known)}")
        for text in self.sbatch_options:
            option(text)
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                raise ConfigError(f"environment: {name!r} is not the name of a variable")
        self._refuse_credentials()

    def _refuse_credentials(self) -> None:
        for name, value in self.environment.items():
            if is_secret_name(name) or redact_text(value) != value:
                raise ConfigError(
                    f"environment: {name} looks like a credential, and batch scripts are readable "
                    "by others: export it in the shell that calls sbatch, which passes it on"
                )
        for text in (*self.setup, *self.container_mounts, self.container):
            refuse_credential(text)

    @property
    def tasks_per_node(self) -> int:
        """Processes on each node, if sbatch is not told otherwise."""
        return self.gpus_per_node or self.processes_per_node


def refuse_credential(text: str) -> None:
    """Refuse a text that gives a secret a value.

    Raises:
        SlurmError: it does; the value is not repeated.
    """
    if redact_text(text) != text:
        raise SlurmError(
            "a credential may not be rendered into a batch script, which others can read: "
            f"export it in the shell that calls sbatch ({redact_text(text)})"
        )


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
