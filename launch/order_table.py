"""A report of a data order as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kinodit.data.order_report import CORRELATION, ClassLine, OrderReport

MAX_CLASSES, NUM_BINS, BAR_CHARS = 12, 10, 30


def table(report: OrderReport, notes: Sequence[str], steps: int) -> str:
    """All of the report; `steps` are those of the run."""
    lines: list[str] = []
    for line in report.datasets:
        epochs = steps / line.epoch_steps
        lines.append(
            f"{line.name}: {line.num_eligible:,} of {line.num_samples:,} samples, "
            f"{100 * line.share:.3g} % of a step; an epoch is {line.epoch_steps:,.1f} steps, the "
            f"run {epochs:,.2f} epochs"
        )
        lines += [f"  {left:>12,} left: {text}" for text, left in line.selection]
    lines += ["", *_classes(report.classes), "", "tokens of a sample"]
    lines += _histogram(report.tokens)
    return "\n".join([*lines, "", *_steps(report), *(f"note: {note}" for note in notes)])


def _classes(classes: Sequence[ClassLine]) -> list[str]:
    shown = classes if len(classes) <= MAX_CLASSES else classes[: MAX_CLASSES - 1]
    lines = [f"{'frames x rows x columns':<24}{'tokens':>9}{'samples':>10}{'cost':>9}"]
    for line in shown:
        size = "as the recipe says" if line.shape is None else " x ".join(map(str, line.shape))
        shares = f"{100 * line.samples:>8.2f} %{100 * line.cost:>7.2f} %"
        lines.append(f"{size:<24}{line.tokens:>9,}{shares}  {_bar(line.cost)}".rstrip())
    rest = classes[len(shown) :]
    if rest:
        samples, cost = sum(line.samples for line in rest), sum(line.cost for line in rest)
        name = f"{len(rest):,} other sizes"
        lines.append(
            f"{name:<24}{'':>9}{100 * samples:>8.2f} %{100 * cost:>7.2f} %  {_bar(cost)}".rstrip()
        )
    return lines


def _histogram(tokens: Mapping[int, int]) -> list[str]:
    values = np.array(list(tokens))
    low, high = int(values.min()), int(values.max())
    if low == high:
        return [f"  {low:,} each, at most"]
    counts, edges = np.histogram(values, NUM_BINS, weights=list(tokens.values()))
    most = int(counts.max())
    ends = [f"  {round(edges[n]):>9,} to {round(edges[n + 1]):>9,}" for n in range(NUM_BINS)]
    return [
        f"{ends[n]} {count:>11,}  {_bar(count / most)}".rstrip()
        for n, count in enumerate(counts.tolist())
    ]


def _steps(report: OrderReport) -> list[str]:
    steps = report.steps
    least, mean, most = steps.samples
    many = f"{mean:,.0f}" if least == most else f"{least:,} to {most:,} (mean {mean:,.0f})"
    budget = (
        "no budget" if steps.used is None
        else f"{100 * steps.used:.1f} % of {report.token_budget:,} tokens used"
    )  # fmt: skip
    fetched = ""
    if steps.fetched is not None:
        fetched = f"; of remote ones {steps.fetched:,.2f} bytes are fetched for each that is used"
    rows = [
        ("samples of a step", many),
        ("packs of a step", f"{steps.packs:.1f}, {budget}"),
        ("padding", "none: packs have no padding, and no sample is dropped"),
        (
            f"balance on {report.num_ranks} ranks",
            f"{steps.rounds:.1f} forward passes a step; the costliest rank is {steps.waiting:.3f} "
            f"times the mean; {100 * steps.empty:.1f} % of packs are empty",
        ),
        ("reads", f"{steps.bytes / 2**20:,.1f} MiB from {steps.shards:.1f} shards a step{fetched}"),
        (
            "shuffling",
            f"{steps.same_shard:.1f} samples of a step share a shard, in a full shuffle "
            f"{steps.same_if_full:.1f}",
        ),
        (
            "",
            f"a step's mean varies {steps.design_effect:.2f} times as much as in one, if samples "
            f"of a shard correlate by {CORRELATION:g}",
        ),
    ]
    if report.references is not None:
        found = report.references
        rows.insert(
            2,
            (
                "reference pictures",
                f"{found.with_some / found.num_steps:.1f} samples of a step bring some; of these "
                f"{found.pictures / found.num_steps:.1f} take part, at most {found.most} in a "
                "pack; the order counts the most that there can be for every sample",
            ),
        )
    head = f"of the first {steps.num_steps} steps"
    return [head, *(f"  {name:<22} {text}" for name, text in rows)]


def _bar(share: float) -> str:
    return "█" * round(BAR_CHARS * share)
