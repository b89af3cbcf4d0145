"""Batch scripts, rendered from a recipe, a cluster's facts and a template.

Nodes, GPUs and time are sbatch's to say: a script holds them as `#SBATCH` defaults at most, and
its body goes by what Slurm granted. Values enter through the gates of `quoting.py` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import jinja2

from kinodit.launch.slurm.cluster import ClusterConfig, load_cluster, refuse_credential
from kinodit.launch.slurm.quoting import SlurmError, directive, one_line, option, quote
from kinodit.trainer.config import load_config

TEMPLATES = ("train", "evaluate", "validate", "validate_summary", "encode")


@dataclass(frozen=True)
class Job:
    """What a script runs, and the command that rendered it.

    template:  one of `TEMPLATES`
    config_path, overrides: the recipe that is trained unless the script is given another; none
        for scripts that train nothing
    num_nodes: the default of --nodes; 0 leaves it to sbatch
    script:    where the script will be written, if anywhere
    """

    template: str
    name: str
    config_path: Path | None
    overrides: tuple[str, ...]
    cluster_name: str
    num_nodes: int
    script: Path | None

    @property
    def command(self) -> list[str]:
        """The words of the command line that renders this script."""
        words = ["kinodit", "slurm", "render"]
        if self.config_path is not None:
            words += [str(self.config_path), *self.overrides]
        else:
            words += ["--template", self.template]
        words += ["--cluster", self.cluster_name]
        if self.num_nodes:
            words += ["--nodes", str(self.num_nodes)]
        return words + (["--out", str(self.script)] if self.script else [])


def training_job(
    config_path: Path,
    overrides: Sequence[str],
    cluster_name: str,
    num_nodes: int = 0,
    script: Path | None = None,
) -> Job:
    """The job that trains a recipe.

    Raises:
        ConfigError: the recipe or the cluster file does not fit, or their world size does not.
        SlurmError: `num_nodes` is negative.
    """
    if num_nodes < 0:
        raise SlurmError(f"--nodes {num_nodes}: must be at least 1")
    config = load_config(config_path, overrides)
    if num_nodes:
        config.parallel.resolve(num_nodes * load_cluster(cluster_name).tasks_per_node)
    return Job(
        template="train",
        name=config.run.name,
        config_path=config_path,
        overrides=tuple(overrides),
        cluster_name=cluster_name,
        num_nodes=num_nodes,
        script=script,
    )


def other_job(template: str, cluster_name: str, script: Path | None = None) -> Job:
    """A job that trains nothing.

    Raises:
        SlurmError: there is no such template.
    """
    others = [name for name in TEMPLATES if name != "train"]
    if template not in others:
        raise SlurmError(f"--template {template}: there is {', '.join(others)}")
    return Job(template, template, None, (), cluster_name, 0, script)


def fill(job: Job, cluster: ClusterConfig) -> str:
    """The template with the facts of one job and one cluster.

    Raises:
        SlurmError: a value may not stand in a batch script.
    """
    for text in job.overrides:
        refuse_credential(text)
    return _template(job.template).render(job=job, cluster=cluster)


@cache
def _template(name: str) -> jinja2.Template:
    folder = files("kinodit") / "slurm" / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda file: (folder / file).read_text()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # "{#" is bash's, in ${#array[@]}.
        comment_start_string="<#",
        comment_end_string="#>",
        # Shell, not HTML: the filters are the gates.
        autoescape=False,
    )
    environment.filters |= {
        "q": quote,
        "line": one_line,
        "directive": directive,
        "option": option,
    }
    return environment.get_template(f"{name}.sbatch.j2")
