"""The plan's order as the first stage of a `webdataset.DataPipeline`.

    source = OrderedSource(spec, datasets, start_step=1200)
    pipeline = webdataset.DataPipeline(source, webdataset.decode_my_way, webdataset.select(wanted))

Stages of a user's own run unchanged behind it, and a pipeline that starts at a step goes on exactly
where another one stopped: the order is a function of the spec, and the state is the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from kinodit.data.manifest import Dataset
from kinodit.data.plan import assign, plan
from kinodit.data.reader import ShardReader
from kinodit.data.record import encode_record
from kinodit.data.spec import PlanError, PlanSpec


class OrderedSource(IterableDataset[dict[str, Any]]):
    """Samples as webdataset has them: `__key__`, `__url__` and the bytes of each member.

    Beside these `__step__` and `__slot__`: the place in the plan. Bytes are checked against their
    CRC; nothing is decoded.
    """

    def __init__(
        self,
        spec: PlanSpec,
        datasets: Mapping[str, Dataset],
        dp_index: int = 0,
        dp_size: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
    ) -> None:
        """Arguments as of `kinodit.data.loader.Loader`."""
        self._spec = spec
        self._datasets = datasets
        self._dp = dp_index, dp_size
        self._end_step = end_step
        self._next_step = start_step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples, step after step, from the first one that was not given whole.

        Raises:
            ShardError: a sample cannot be read.
        """
        readers = {name: ShardReader(dataset) for name, dataset in self._datasets.items()}
        try:
            while self._end_step is None or self._next_step < self._end_step:
                step = self._next_step
                for pack in assign(plan(self._spec, step), *self._dp):
                    for ref in pack:
                        dataset = self._datasets[ref.dataset]
                        yield {
                            **encode_record(readers[ref.dataset].read(ref.index)),
                            "__url__": dataset.place_of(dataset.span(ref.index)[0]),
                            "__step__": step,
                            "__slot__": ref.slot,
                        }
                self._next_step = step + 1
        finally:
            for reader in readers.values():
                reader.close()

    def state_dict(self) -> dict[str, Any]:
        """The step to go on from, and the fingerprint of the order that it belongs to."""
        return {"step": self._next_step, "plan": self._spec.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a step of the same order. Raises PlanError for one of another order."""
        if state["plan"] != self._spec.fingerprint:
            raise PlanError(
                f"the state is of data order {state['plan']}, this is {self._spec.fingerprint}: "
                "the datasets, their filters or the recipe changed"
            )
        self._next_step = int(state["step"])
