"""Certify a recipe: its twin on one process, then on every layout, and a row for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from kinodit.trainer.certify.band import NUM_PERTURBED, compare_in_band
from kinodit.trainer.certify.cause import likely_cause
from kinodit.trainer.certify.engines import ENGINES
from kinodit.trainer.certify.layouts import layout_name, num_ranks, with_degrees
from kinodit.trainer.certify.probe import first_difference
from kinodit.trainer.certify.ranks import COMPILING_S, TIMEOUT_S, RankError, Ranks
from kinodit.trainer.certify.trace import NATIVE, Trace, trace
from kinodit.trainer.certify.twin import Twin
from kinodit.trainer.certify.verdict import Verdict, compare_traces
from kinodit.trainer.engine.config import EngineConfig
from kinodit.trainer.parallel.mesh import ParallelConfig

Variant = Literal["", "merged", "compiled"]
"""How an engine is run besides.

merged:   all packs of a rank in one forward, where the reference adds gradients up pack by pack
compiled: with `engine.compile`
"""


@dataclass(frozen=True)
class Case:
    """What one row is about. dtype: "float64" or "bfloat16"; engine: a key of ENGINES."""

    layout: ParallelConfig
    dtype: str = "float64"
    engine: str = "native"
    variant: Variant = ""

    @property
    def engine_config(self) -> EngineConfig:
        """The engine, run as the variant says."""
        engine = ENGINES[self.engine]
        if self.variant == "merged":
            return replace(engine, micro_batches=1)
        return replace(engine, compile=True) if self.variant else engine


@dataclass(frozen=True)
class Row:
    """One case's result.

    verdict: None where it did not run to its end; `faults` say why
    where:   the first module that differs, and whether in its output or its gradient
    cause:   what is likely wrong; empty if nothing is
    """

    layout: str
    dtype: str
    num_ranks: int
    verdict: Verdict | None
    faults: tuple[str, ...]
    where: str = ""
    cause: str = ""
    engine: str = "native"
    variant: Variant = ""

    @property
    def ok(self) -> bool:
        """Whether the layout trains as one process does."""
        return self.verdict is not None and self.verdict.ok

    def to_json(self) -> dict[str, object]:
        """The row as `kinodit certify --json` writes it; an error that is not known is null."""
        known = self.verdict
        return {
            "layout": self.layout,
            "engine": self.engine,
            "variant": self.variant,
            "dtype": self.dtype,
            "num_ranks": self.num_ranks,
            "max_gradient_error": known.max_gradient_error if known else None,
            "loss_error": known.loss_error if known else None,
            "parameter_error": known.parameter_error if known else None,
            "average_error": known.average_error if known else None,
            "noise_ratio": known.noise_ratio if known else None,
            "ok": self.ok,
            "faults": list(self.faults),
            "where": self.where,
            "cause": self.cause,
        }


class Certifier:
    """Runs cases of one twin. Starts processes as they are needed, and stops them at the end.

    device: "cpu" (gloo) or "cuda" (NCCL, one device per rank)
    """

    def __init__(self, twin: Twin, device: str = "cpu") -> None:
        self._twin, self._device = twin, device
        self._alone = with_degrees(twin.config.parallel, {})
        self._groups: dict[tuple[int, int], Ranks] = {}
        self._references: dict[tuple[str, int, bool], Trace] = {}

    def __call__(self, case: Case) -> Row:
        """The row of one case."""
        try:
            traces = self._run(case.layout, case.dtype, engine=case.engine_config)
        except (RankError, TimeoutError) as error:
            return _row(case, None, (str(error),))
        reference = self._reference(case.dtype)
        if case.dtype == "float64":
            verdict = compare_traces(reference, traces)
        else:
            rerun = [self._reference(case.dtype, k) for k in range(1, 1 + NUM_PERTURBED)]
            reach = 2 * self._twin.num_steps * self._twin.config.optim.lr
            verdict = compare_in_band(reference, rerun, traces, reach)
        if verdict.ok:
            return _row(case, verdict, ())
        return self._explained(case, verdict, reference, traces)

    def _explained(
        self, case: Case, verdict: Verdict, reference: Trace, traces: list[Trace]
    ) -> Row:
        """The row of a case that differs, with the module where it begins to."""
        try:
            probed = self._run(case.layout, "float64", probed=True, engine=case.engine_config)
        except (RankError, TimeoutError):
            where = None
        else:
            expected = self._reference("float64", probed=True).probes
            where = first_difference(expected, [one.probes for one in probed])
        cause = likely_cause(verdict.faults, reference.gradients, traces[0].gradients, where)
        found = f"{where[1]} of {where[0]}" if where else ""
        return _row(case, verdict, verdict.faults, found, cause)

    def _reference(self, dtype: str, perturbation: int = 0, probed: bool = False) -> Trace:
        key = (dtype, perturbation, probed)
        if key not in self._references:
            (made,) = self._run(self._alone, dtype, perturbation, probed)
            self._references[key] = made
        return self._references[key]

    def _run(
        self,
        layout: ParallelConfig,
        dtype: str,
        perturbation: int = 0,
        probed: bool = False,
        engine: EngineConfig = NATIVE,
    ) -> list[Trace]:
        size = num_ranks(layout)
        timeout_s = TIMEOUT_S + (COMPILING_S if engine.compile else 0)
        key = (size, timeout_s)
        if key not in self._groups:
            self._groups[key] = Ranks(size, device=self._device, timeout_s=timeout_s)
        group = self._groups[key]
        try:
            traces: list[Trace] = group.run(
                trace,
                self._twin,
                layout,
                dtype,
                perturbation,
                probed,
                self._device,
                engine,
            )
        except (RankError, TimeoutError):
            # The group is closed; the next case of this size gets a new one.
            del self._groups[key]
            raise
        return traces

    def close(self) -> None:
        """Stop all processes."""
        for group in self._groups.values():
            group.close()


def _row(
    case: Case, verdict: Verdict | None, faults: tuple[str, ...], where: str = "", cause: str = ""
) -> Row:
    return Row(
        layout_name(case.layout),
        case.dtype,
        num_ranks(case.layout),
        verdict,
        faults,
        where,
        cause,
        case.engine,
        case.variant,
    )


def certify(twin: Twin, cases: Sequence[Case], device: str = "cpu") -> Iterator[Row]:
    """A row for each case, as they are done."""
    with ExitStack() as stack:
        certifier = Certifier(twin, device)
        stack.callback(certifier.close)
        for case in cases:
            yield certifier(case)
