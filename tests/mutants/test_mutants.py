"""Every known bug is noticed by the certificate, and by the line that says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from kinodit.data.tasks import StreamTask, TaskConfig
from kinodit.trainer.certify.cause import likely_cause
from kinodit.trainer.certify.layouts import num_ranks, parse_layouts
from kinodit.trainer.certify.probe import first_difference
from kinodit.trainer.certify.ranks import RankError
from kinodit.trainer.certify.trace import Trace, trace
from kinodit.trainer.certify.twin import Twin, twin
from kinodit.trainer.certify.verdict import compare_traces
from kinodit.trainer.config import load_config
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.mutants.mutations import MUTANTS, Kind, mutated_trace
from tests.support.evidence import write_evidence
from tests.support.ranks import ROOT, Ranks

ALONE = ParallelConfig(dp_shard=1)


TASKS = {
    "inpainting": TaskConfig(streams={"video": StreamTask(given="outside", area=(0.2, 0.8))}),
    "any frames": TaskConfig(streams={"video": StreamTask(given="random", frames=(1, 3))}),
    "blocks": TaskConfig(block_s=0.25),
}


@cache
def small(kind: Kind) -> Twin:
    num_kv_heads, has_tasks = kind
    made = twin(load_config(ROOT / "configs" / "t2v_tiny.yaml"))
    model = replace(made.config.model, num_kv_heads=num_kv_heads or made.config.model.num_kv_heads)
    tasks = TASKS if has_tasks else {}
    return replace(made, config=replace(made.config, model=model, tasks=tasks))


@cache
def reference(kind: Kind, probed: bool = False) -> Trace:
    return trace(0, 1, small(kind), ALONE, probed=probed)


class Groups:
    """Groups of processes by size; one that a mutant broke is started anew."""

    def __init__(self) -> None:
        self._groups: dict[int, Ranks] = {}

    def run(
        self, name: str, layout: ParallelConfig, kind: Kind, probed: bool = False
    ) -> list[Trace]:
        size = num_ranks(layout)
        if size not in self._groups:
            self._groups[size] = Ranks(size)
        try:
            return self._groups[size].run(mutated_trace, name, small(kind), layout, probed)
        except RankError:
            del self._groups[size]
            raise

    def close(self) -> None:
        for group in self._groups.values():
            group.close()


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    made = Groups()
    yield made
    made.close()


@pytest.mark.mutants
@pytest.mark.gloo
@pytest.mark.parametrize(("layout", "kind"), sorted({(m.layout, m.kind) for m in MUTANTS.values()}))
def test_without_a_bug_nothing_is_reported(layout: str, kind: Kind, groups: Groups) -> None:
    (parsed,) = parse_layouts(layout, ALONE)
    verdict = compare_traces(reference(kind), groups.run("", parsed, kind))
    assert verdict.ok, verdict.faults
    probed = groups.run("", parsed, kind, probed=True)
    expected = reference(kind, probed=True).probes
    assert len(expected) > 40
    assert all(sums.scale > 0 for sums in expected.values())
    assert first_difference(expected, [one.probes for one in probed]) is None


@pytest.fixture(scope="module")
def told(size: str) -> Iterator[dict[str, dict[str, str]]]:
    """Bug -> its layout, the line that told it, where it was said to begin and why."""
    lines: dict[str, dict[str, str]] = {}
    yield lines
    if size == "full" and lines.keys() == MUTANTS.keys():
        write_evidence("mutants", "tests/mutants/mutations.py", {"told": lines})


@pytest.mark.mutants
@pytest.mark.gloo
@pytest.mark.parametrize("name", MUTANTS)
def test_a_bug_is_told(
    name: str, groups: Groups, told: dict[str, dict[str, str]], size: str
) -> None:
    mutant = MUTANTS[name]
    (parsed,) = parse_layouts(mutant.layout, ALONE)
    try:
        traces = groups.run(name, parsed, mutant.kind)
    except RankError as error:
        faults: tuple[str, ...] = (str(error),)
    else:
        faults = compare_traces(reference(mutant.kind), traces).faults
    lines = [fault for fault in faults if mutant.expected in fault]
    assert lines, faults
    # A rank that stopped left a traceback, whose last line says why.
    told[name] = {"layout": mutant.layout, "line": lines[0].strip().splitlines()[-1]}
    if mutant.explained or size == "full":
        where, cause = explanation(name, groups)
        assert mutant.explained in f"{where}: {cause}"
        told[name] |= {"where": where, "cause": cause}


def explanation(name: str, groups: Groups) -> tuple[str, str]:
    """Where the bug is said to begin, and what is said to be likely; "" where it stopped a rank."""
    mutant = MUTANTS[name]
    (parsed,) = parse_layouts(mutant.layout, ALONE)
    known = reference(mutant.kind)
    try:
        traces = groups.run(name, parsed, mutant.kind)
        probed = groups.run(name, parsed, mutant.kind, probed=True)
    except RankError:
        return "", ""
    expected = reference(mutant.kind, probed=True).probes
    where = first_difference(expected, [one.probes for one in probed])
    faults = compare_traces(known, traces).faults
    cause = likely_cause(faults, known.gradients, traces[0].gradients, where)
    return f"{where[1]} of {where[0]}" if where else "", cause
