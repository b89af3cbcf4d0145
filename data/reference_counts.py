"""How many reference pictures the packs of a data order hold, which no index says.

The order reserves `data.max_references` for every sample: it follows from the index alone, which
does not know them. Here the records of some steps are read, for estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kinodit.data.manifest import Dataset
from kinodit.data.plan import SampleRef, plan
from kinodit.data.reader import ShardReader
from kinodit.data.record import RecordMeta
from kinodit.data.spec import PlanSpec
from kinodit.data.tasks import TaskConfig, draw_task, is_dropped
from kinodit.models.tokens import SampleKey

StreamsOf = Callable[[RecordMeta], list[str]]
"""The streams of a sample; that of its pictures is the first."""


@dataclass(frozen=True)
class ReferenceCounts:
    """Of the first steps of an order.

    num_samples: of all of them; `with_some`: those that bring pictures along
    pictures:    that take part in their samples' tasks
    most:        of these, in the pack that has most
    """

    num_steps: int
    num_samples: int
    with_some: int
    pictures: int
    most: int


def count_references(
    spec: PlanSpec,
    datasets: Mapping[str, Dataset],
    tasks: Mapping[str, TaskConfig],
    streams_of: StreamsOf,
    num_steps: int,
) -> ReferenceCounts:
    """Counts of the first `num_steps` steps, whose records are read.

    Raises:
        SampleError: a record is damaged.
        TaskError: no task fits a sample.
    """
    readers = {name: ShardReader(dataset) for name, dataset in datasets.items()}

    def taking_part(ref: SampleRef, step: int) -> tuple[bool, int]:
        meta = readers[ref.dataset].read(ref.index).meta
        num = len(meta.references)
        return num > 0, num if num and _are_used(meta, ref.key(step)) else 0

    def _are_used(meta: RecordMeta, key: SampleKey) -> bool:
        streams = streams_of(meta)
        if not tasks or not streams:
            return False
        task = draw_task(tasks, spec.seed, key, streams, streams[:1])
        stream = task.config.stream(streams[0], False)
        if stream.references == "clean":
            return not is_dropped(task, key, streams[0], stream.dropout)
        return stream.references == "target"

    found: list[list[tuple[bool, int]]] = []
    try:
        for step in range(num_steps):
            packs = plan(spec, step).packs
            found += [[taking_part(ref, step) for ref in pack] for pack in packs]
    finally:
        for reader in readers.values():
            reader.close()
    every = [one for pack in found for one in pack]
    return ReferenceCounts(
        num_steps=num_steps,
        num_samples=len(every),
        with_some=sum(has for has, _ in every),
        pictures=sum(used for _, used in every),
        most=max(sum(used for _, used in pack) for pack in found),
    )
