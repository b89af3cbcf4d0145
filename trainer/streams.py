"""What a run with streamed datasets may not do, and what must be said of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kinodit.models.errors import ConfigError

if TYPE_CHECKING:
    from kinodit.trainer.config import RunConfig

NOT_EXACT = "not exact"


def streamed(config: RunConfig) -> list[str]:
    """Names of the datasets that are read as streams."""
    return [name for name, entry in config.data.datasets.items() if entry.stream.shards]


def check_streams(config: RunConfig) -> None:
    """Raises ConfigError where samples that nobody can name would have to be the same twice."""
    names = streamed(config)
    if names and config.parallel.tp * config.parallel.cp > 1:
        raise ConfigError(
            f"data.datasets.{names[0]} is streamed, and parallel.tp={config.parallel.tp} x "
            f"cp={config.parallel.cp} ranks share their samples: each would read others. Use "
            "parallel.dp_shard, or index the dataset (`kinodit data index`)"
        )
    validated = config.eval.datasets or config.data.datasets
    for name, entry in validated.items():
        if config.eval.every_steps and entry.stream.shards:
            raise ConfigError(
                f"the loss is measured on data.datasets.{name}, which is streamed: it would be on "
                "other samples after every start. Name an indexed one in eval.datasets, or set "
                "eval.every_steps=0"
            )


def not_exact(names: list[str]) -> str:
    """What is said of streamed datasets wherever a run is told of; "" if there are none."""
    if not names:
        return ""
    many = "are streams" if len(names) > 1 else "is a stream"
    return (
        f"{NOT_EXACT}: {', '.join(names)} {many}. Which of the samples are used, and how often, "
        "depends on ranks, threads and restarts, and no ledger proves anything of them. "
        "`kinodit data index` makes shards exact that can be read by offset"
    )


def streamed_in(config: Mapping[str, Any]) -> list[str]:
    """The same names, of a run's config.yaml as plain data."""
    data = config.get("data")
    datasets = data.get("datasets") if isinstance(data, Mapping) else None
    if not isinstance(datasets, Mapping):
        return []
    found = []
    for name, entry in datasets.items():
        stream = entry.get("stream") if isinstance(entry, Mapping) else None
        if isinstance(stream, Mapping) and stream.get("shards"):
            found.append(str(name))
    return found
