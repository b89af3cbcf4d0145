"""A plan in a terminal, and as JSON."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from kinodit.launch.plan.estimate import Estimate, Settings
from kinodit.launch.plan.hardware import GIB, LATENCY_S, MADE_TO_MOVED
from kinodit.launch.plan.search import Found, name_of
from kinodit.models.flops import count_active_parameters, count_parameters

if TYPE_CHECKING:
    from kinodit.launch.plan.dryrun import DryRun

WIDTH = 100
Lines = list[str]


def plan(settings: Settings, found: Found, top: int) -> str:
    """The whole plan."""
    lines = _header(settings)
    lines += _ranking(found, top)
    if found.fitting:
        lines += _memory(settings, found.fitting[0]) + _time(settings, found.fitting[0])
    lines += _asked(found) + _refused(settings, found)
    return "\n".join(lines)


def _header(settings: Settings) -> Lines:
    work, cluster = settings.workload, settings.cluster
    gpu, shares = cluster.gpu, cluster.shares
    tokens = " + ".join(f"{count} {name}" for name, count in work.tokens.items())
    formats = settings.formats
    size = f"{count_parameters(work.model) / 1e9:.2f} B parameters"
    if work.model.experts:
        size += f", of which a token meets {count_active_parameters(work.model) / 1e9:.2f} B"
    lines = [
        f"model    {size}; {formats.params * 8}-bit "
        f"at rest, {formats.compute * 8}-bit computation; {settings.num_averages} average(s)",
        f"step     {work.packs} pack(s) of {work.segments} sample(s) of {tokens} tokens; "
        f"{3 * work.flops * work.packs / 1e15:.1f} PFLOP",
        f"cluster  {cluster.num_gpus} x {gpu.name}, {cluster.memory / GIB:.1f} GiB each, of which "
        f"{cluster.reserved / GIB:.1f} are not planned with; {cluster.per_node} a node",
        f"assumed  peak {gpu.flops_s / 1e12:.0f} TFLOP/s in bf16, of which products reach "
        f"{shares.products:.0%} and attention {shares.attention:.0%};",
        f"         memory {gpu.memory_s / 1e12:.2f} TB/s ({shares.memory:.0%}, each byte made is "
        f"moved {MADE_TO_MOVED} times); links {gpu.link_s / 1e9:.0f} GB/s in a node,",
        f"         {cluster.network_s / 1e9:.1f} GB/s between nodes ({shares.links:.0%}, "
        f"{LATENCY_S * 1e6:.0f} us a message); dp traffic hides behind",
        "         computation, a ring's behind its attention. Estimates: none measured on a GPU.",
    ]
    for note in work.notes:
        lines += textwrap.wrap(f"note     {note}", WIDTH, subsequent_indent=" " * 9)
    return lines


def _ranking(found: Found, top: int) -> Lines:
    num = len(found.fitting)
    if not num:
        return ["", "no layout fits"]
    lines = ["", f"{num} layouts fit; the fastest, each with its best division of dp:"]
    lines.append(f"  {'#':>2}  {'layout':<58} {'GiB':>6} {'s/step':>8} {'MFU':>5}")
    for place, one in enumerate(found.distinct()[:top], 1):
        name = name_of(one.parallel, one.remat)
        lines.append(
            f"  {place:>2}  {name:<58} {one.memory.total / GIB:>6.1f} {one.time.step_s:>8.2f} "
            f"{one.mfu:>5.0%}"
        )
    return lines


def _memory(settings: Settings, best: Estimate) -> Lines:
    memory = best.memory
    lines = ["", "memory of the first, GiB on the fullest rank:"]
    lines.append("  " + " ".join(f"{name:>11}" for name in [*memory.parts, "total"]))
    sizes = [*memory.parts.values(), memory.total]
    lines.append("  " + " ".join(f"{size / GIB:>11.2f}" for size in sizes))
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    free = (settings.cluster.usable - memory.total) / GIB
    rest = f"; {memory.host / GIB:.1f} GiB on the host" if memory.host else ""
    lines.append(f"  most is {largest}; {free:.1f} GiB are left{rest}")
    return lines


def _time(settings: Settings, best: Estimate) -> Lines:
    total = best.time.step_s
    parts = sorted(best.time.parts.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts)
    model, hardware = best.time.model_flops, best.time.hardware_flops
    lines = [
        "",
        f"time of the first: {shown}",
        f"  {best.passes} forward(s) a rank; {hardware / model:.2f} FLOPs computed for each of the "
        "model's",
    ]
    for axis in dict.fromkeys(one.axis for one in best.traffic):
        parts_of = [one for one in best.traffic if one.axis == axis]
        nbytes, count = sum(one.nbytes for one in parts_of), sum(one.count for one in parts_of)
        span = parts_of[0].span
        seconds = nbytes / settings.cluster.bandwidth(span)
        where = "in a node" if span <= settings.cluster.per_node else "between nodes"
        lines.append(
            f"  {axis:<12} {nbytes / GIB:>8.2f} GiB received in {count:>6} messages "
            f"{where:<13} {seconds:>6.2f} s if nothing hides it"
        )
    return lines


def _asked(found: Found) -> Lines:
    asked = found.asked
    if asked is None:
        return []
    if asked.problem:
        text = f"the recipe's own layout, {asked.name}, does not fit: {asked.problem}"
        return ["", *textwrap.wrap(text, WIDTH)]
    assert asked.estimate is not None
    made = asked.estimate
    return [
        "",
        f"the recipe's own layout, {asked.name}, fits: {made.memory.total / GIB:.1f} GiB, "
        f"{made.time.step_s:.2f} s a step, MFU {made.mfu:.0%}",
    ]


EXPLAINED = {
    "memory": "need more memory; the closest",
    "heads": "cannot split the heads; for instance",
    "widths": "cannot split a matrix; for instance",
    "packs": "have more data-parallel ranks than packs; for instance",
    "tokens": "have more ranks than tokens; for instance",
    "micro-batches": "cannot have the recipe's micro-batches; for instance",
    "cpu_offload": "cannot offload; for instance",
    "engine": "are not the engine's; for instance",
    "ep": "cannot deal experts out; for instance",
}


def _refused(settings: Settings, found: Found) -> Lines:
    lines = ["", f"why the others are out ({settings.cluster.usable / GIB:.1f} GiB can be had):"]
    for why, group in found.refused.items():
        text = f"{group.count} {EXPLAINED[why]} {group.example}"
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="      ")
    return lines if found.refused else []


def dry_run(result: DryRun) -> str:
    """What was built, and how it compares."""
    lines = ["", f"dry run of {result.name} on {result.world_size} ranks, as rank"]
    lines[-1] += f"{'s' if len(result.ranks) > 1 else ''} {', '.join(map(str, result.ranks))}:"
    for check in result.checks:
        verdict = "ok" if check.ok else "DIFFERS"
        lines.append(
            f"  {check.name:<34} planned {check.planned:>16,}  found {check.found:>16,}  "
            f"{check.ratio:>6.3f}  {verdict}"
        )
    lines.append(f"  in {result.seconds:.1f} s; {result.remark}")
    return "\n".join(lines)


def document(settings: Settings, found: Found, top: int) -> dict[str, Any]:
    """The plan as plain data; bytes, seconds and FLOPs."""
    work, cluster = settings.workload, settings.cluster
    asked = found.asked
    return {
        "model": {
            "parameters": count_parameters(work.model),
            "active_parameters": count_active_parameters(work.model),
        },
        "step": {
            "packs": work.packs,
            "segments": work.segments,
            "tokens": dict(work.tokens),
            "model_flops": 3 * work.flops * work.packs,
        },
        "cluster": {
            "gpu": cluster.gpu.name,
            "gpus": cluster.num_gpus,
            "memory": cluster.memory,
            "reserved": cluster.reserved,
            "network_bytes_s": cluster.network_s,
            "shares": vars(cluster.shares),
        },
        "notes": list(work.notes),
        "num_fitting": len(found.fitting),
        "layouts": [layout_row(one) for one in found.distinct()[:top]],
        "asked": None
        if asked is None
        else {
            "name": asked.name,
            "problem": asked.problem,
            "layout": None if asked.estimate is None else layout_row(asked.estimate),
        },
        "refused": {
            why: {"count": group.count, "example": group.example}
            for why, group in found.refused.items()
        },
    }


def layout_row(one: Estimate) -> dict[str, Any]:
    """One layout as plain data."""
    degrees = {
        name: getattr(one.parallel, name)
        for name in ("dp_replicate", "dp_shard", "cp", "ring", "tp", "ep")
    }
    return {
        **degrees,
        "remat": one.remat.mode,
        "passes": one.passes,
        "memory": dict(one.memory.parts),
        "memory_total": one.memory.total,
        "host": one.memory.host,
        "time_s": dict(one.time.parts),
        "step_s": one.time.step_s,
        "mfu": one.mfu,
        "hardware_flops": one.time.hardware_flops,
        "traffic": {
            t.label: {"axis": t.axis, "bytes": t.nbytes, "messages": t.count, "span": t.span}
            for t in one.traffic
        },
    }
