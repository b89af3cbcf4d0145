"""Certify a recipe: its twin on one process, then on every layout, and a row for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from kinodit.trainer.certify.compare import Verdict, compare
from kinodit.trainer.certify.layouts import layout_name, num_ranks, with_degrees
from kinodit.trainer.certify.ranks import RankError, Ranks
from kinodit.trainer.certify.trace import trace
from kinodit.trainer.certify.twin import Twin
from kinodit.trainer.parallel.mesh import ParallelConfig


@dataclass(frozen=True)
class Row:
    """One layout's result. `verdict` is None where it did not run to its end; `faults` say why."""

    layout: str
    num_ranks: int
    verdict: Verdict | None
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the layout trains as one process does."""
        return self.verdict is not None and self.verdict.ok

    def to_json(self) -> dict[str, object]:
        """The row as `kinodit certify --json` writes it; an error that is not known is null."""
        known = self.verdict
        return {
            "layout": self.layout,
            "dtype": "float64",
            "num_ranks": self.num_ranks,
            "max_gradient_error": known.max_gradient_error if known else None,
            "loss_error": known.loss_error if known else None,
            "parameter_error": known.parameter_error if known else None,
            "average_error": known.average_error if known else None,
            "ok": self.ok,
            "faults": list(self.faults),
        }


def certify(twin: Twin, layouts: Sequence[ParallelConfig]) -> Iterator[Row]:
    """A row for each layout, as they are done. Starts gloo processes; needs no accelerator."""
    alone = with_degrees(twin.config.parallel, {})
    with ExitStack() as stack:
        groups: dict[int, Ranks] = {}

        def group(size: int) -> Ranks:
            if size not in groups:
                groups[size] = Ranks(size)
                stack.callback(groups[size].close)
            return groups[size]

        (reference,) = group(1).run(trace, twin, alone)
        for layout in layouts:
            size = num_ranks(layout)
            try:
                verdict = compare(reference, group(size).run(trace, twin, layout))
            except (RankError, TimeoutError) as error:
                # The group is closed; the next layout of this size gets a new one.
                groups.pop(size)
                yield Row(layout_name(layout), size, None, (str(error),))
                continue
            yield Row(layout_name(layout), size, verdict, verdict.faults)
