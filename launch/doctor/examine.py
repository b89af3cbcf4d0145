"""All checks of a job in their order: alone, then together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from kinodit.launch.doctor.network import Meeting, absent, check_network
from kinodit.launch.doctor.node import check_node
from kinodit.launch.doctor.report import Check, RankReport, Verdict
from kinodit.launch.topology import granted_gpus, meeting_point, node_name
from kinodit.trainer.topology import Topology


def examine(
    topology: Topology, folder: Path, passed: Path | None, deadline_s: float
) -> list[RankReport]:
    """The reports of all ranks that came, on every rank. Collective.

    The first rank of each node whose own checks none failed leaves a file of the node's name in
    `passed`: what keeps ranks apart is not held against those that came.
    """
    report = RankReport(
        topology.rank,
        node_name(),
        tuple(check_node(folder, topology.local_rank, granted_gpus())),
    )
    if topology.world_size == 1:
        _pass(topology, [report], passed)
        return [report]
    host, port = meeting_point()
    try:
        meeting = Meeting(topology, host, port, deadline_s)
    except dist.DistError as error:
        _pass(topology, [report], passed)
        line = str(error).splitlines()[0]
        return [_with(report, Check("ranks", Verdict.FAIL, f"cannot reach rank 0: {line}"))]
    meeting.tell("alone", report)
    reports = meeting.gather("alone")
    attendance = absent(reports, topology.world_size)
    _pass(topology, reports, passed)
    if attendance.verdict is Verdict.PASS:
        meeting.tell("together", _with(report, attendance, *_together(meeting, topology, reports)))
        reports = meeting.gather("together")
    else:
        reports = [_with(other, attendance) for other in reports]
    meeting.leave(len(reports))
    return reports


def _together(meeting: Meeting, topology: Topology, reports: list[RankReport]) -> Sequence[Check]:
    try:
        meeting.join()
        try:
            return check_network(topology, reports)
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        return [Check("collectives", Verdict.FAIL, line)]


def _pass(topology: Topology, reports: Sequence[RankReport], passed: Path | None) -> None:
    node = node_name()
    fit = all(r.verdict is not Verdict.FAIL for r in reports if r.node == node)
    if passed is not None and topology.local_rank == 0 and fit:
        (passed / node).touch()


def _with(report: RankReport, *checks: Check) -> RankReport:
    return replace(report, checks=(*report.checks, *checks))
