"""What the checks found, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum


class Verdict(IntEnum):
    """How a check ended; the highest decides for the whole."""

    PASS = 0
    WARN = 1
    FAIL = 2


@dataclass(frozen=True)
class Check:
    """name: what was looked at; found: what was seen, and if need be what to do about it."""

    name: str
    verdict: Verdict
    found: str


@dataclass(frozen=True)
class RankReport:
    """All that one rank found, and the node that it ran on."""

    rank: int
    node: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of its checks."""
        return worst(self.checks)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankReport:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        checks = tuple(
            Check(check["name"], Verdict(check["verdict"]), check["found"])
            for check in fields["checks"]
        )
        return cls(fields["rank"], fields["node"], checks)


def worst(checks: Iterable[Check]) -> Verdict:
    """The highest verdict; PASS of nothing."""
    return max((check.verdict for check in checks), default=Verdict.PASS)


def table(reports: Sequence[RankReport]) -> str:
    """One line for what all ranks found alike; one for each node where they differ."""
    names = dict.fromkeys(check.name for report in reports for check in report.checks)
    rows: list[tuple[str, str, str]] = []
    for name in names:
        seen: dict[tuple[Verdict, str], list[RankReport]] = {}
        for report in reports:
            for check in report.checks:
                if check.name == name:
                    seen.setdefault((check.verdict, check.found), []).append(report)
        for (verdict, found), where in sorted(seen.items(), key=lambda item: -item[0][0]):
            nodes = list(dict.fromkeys(report.node for report in where))
            everywhere = len(where) == len(reports)
            place = "" if everywhere else f"{_listed(nodes)}: "
            rows.append((verdict.name.lower(), name, place + found))
    width = max(len(name) for _, name, _ in rows)
    lines = [f"{verdict}  {name:<{width}}  {found}" for verdict, name, found in rows]
    overall = max(report.verdict for report in reports).name.lower()
    num_nodes = len({report.node for report in reports})
    head = f"kinodit doctor: {num_nodes} node(s), {len(reports)} rank(s): {overall}"
    return "\n".join([head, *lines])


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
