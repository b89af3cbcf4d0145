"""Activations of a forward and backward pass: what is kept, and the most that is there at once.

Blocks of a kind cost the same, so a model of many blocks is followed through a few
(`launch/plan/blocks.py`) and put together from them. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

from kinodit.launch.plan import ops
from kinodit.launch.plan.blocks import Blocks, Pass, Streams
from kinodit.launch.plan.shadow import Shadow, Tape
from kinodit.models.config import SINGLE, MMDiTConfig
from kinodit.models.moe.config import ExpertsConfig
from kinodit.trainer.parallel.remat import RematConfig

T = TypeVar("T")
Mode = Literal["none", "selective", "every_nth", "full", "offload"]

MODES: tuple[Mode, ...] = ("none", "selective", "every_nth", "full", "offload")
"""Modes of `trainer/parallel/remat.py`, from the least recomputed to the least kept."""


@dataclass(frozen=True)
class Activations:
    """kept: at the end of the forward; peak: the most at once; host: moved to the host at the end.

    made: all that is ever allocated, a measure of the traffic of pointwise ops
    """

    kept: int
    peak: int
    host: int
    made: int


@dataclass
class Stretch:
    """One block, or what is before or after all of them. `before`: bytes in use as it starts.

    kept, host:    bytes that it adds to what is kept on the device, and on the host
    working:       the most that is in use on top of `before`, forward or backward
    made:          bytes allocated
    first_node:    of its forward
    """

    before: int
    first_node: int
    kept: int = 0
    host: int = 0
    working: int = 0
    made: int = 0


@dataclass
class Trail:
    """The stretches of a pass: embeddings, one for each block that was followed, heads."""

    tape: Tape
    stretches: list[Stretch] = field(default_factory=list)

    def start(self) -> None:
        """End the stretch so far and begin another."""
        self.end()
        meter = self.tape.meter
        meter.restart()
        self.stretches.append(Stretch(meter.current, self.tape.num_nodes))
        self._made, self._host = meter.made, self.tape.host.current

    def end(self) -> None:
        """Note what the stretch so far has kept."""
        if self.stretches:
            last, meter = self.stretches[-1], self.tape.meter
            last.kept, last.working = meter.current - last.before, meter.peak - last.before
            last.made += meter.made - self._made
            last.host = self.tape.host.current - self._host

    def back(self, outputs: Sequence[Shadow]) -> None:
        """The backward; each stretch is charged for its own nodes."""
        meter, place = self.tape.meter, len(self.stretches) - 1
        meter.restart()
        made = meter.made

        def charge() -> None:
            here = self.stretches[place]
            here.working = max(here.working, meter.peak - here.before)
            here.made += meter.made - made

        def on_node(order: int) -> None:
            nonlocal place, made
            while order < self.stretches[place].first_node:
                charge()
                meter.restart()
                place, made = place - 1, meter.made

        self.tape.backward(outputs, on_node)
        charge()


def follow(work: Pass, chosen: Sequence[tuple[int, str]]) -> list[Stretch]:
    """Through the `chosen` (index, mode) of the model's blocks, in order."""
    tape = Tape(copies_back=work.sizes.cuda)
    trail = Trail(tape)
    trail.start()
    blocks = Blocks(tape, work)
    model = work.model
    x: Streams = {name: blocks.embed(name) for name in model.streams}
    first_single = model.num_double_blocks
    for index, mode in chosen:
        if index < first_single:
            trail.start()
            x = _run(tape, mode, partial(blocks.joint, x, index))
    if model.num_single_blocks:
        trail.start()
        blocks.merge()
        joint = ops.cat(tape, list(x.values()))
        sizes = [part.nbytes for part in x.values()]
        for index, mode in chosen:
            if index >= first_single:
                trail.start()
                joint = _run(tape, mode, partial(blocks.single, joint, index - first_single))
        trail.start()
        x = dict(zip(x, ops.split(tape, joint, sizes), strict=True))
        del joint
    else:
        trail.start()
    outputs = [
        blocks.head(name, x[name]) for name, stream in model.streams.items() if stream.output
    ]
    del x, blocks
    trail.end()
    trail.back(outputs)
    return trail.stretches


def _run(tape: Tape, mode: str, forward: Callable[[], T]) -> T:
    if mode == "none":
        return forward()
    if mode == "offload":
        return tape.offload(forward)
    return tape.recompute(forward, selective=mode == "selective")


def block_modes(model: MMDiTConfig, remat: RematConfig) -> list[str]:
    """What each block does: "none", "full", "selective" or "offload"."""
    count = model.num_double_blocks + model.num_single_blocks
    mode = "full" if remat.mode == "every_nth" else remat.mode
    selected = remat.selected(count)
    return [mode if index in selected else "none" for index in range(count)]


def activations(work: Pass, remat: RematConfig) -> Activations:
    """What one forward and backward takes under `remat`."""
    modes = block_modes(work.model, remat)
    kinds = list(_kinds(work.model, modes))
    chosen = _representatives(kinds)
    stretches = follow(work, [(index, modes[index]) for index in chosen])
    first_single = sum(index < work.model.num_double_blocks for index in chosen)
    is_seam = work.model.num_single_blocks > 0
    places = [1 + at + (is_seam and at >= first_single) for at in range(len(chosen))]
    stands_for = {kinds[index]: stretches[at] for index, at in zip(chosen, places, strict=True)}
    exact = {index: stretches[at] for index, at in zip(chosen, places, strict=True)}
    line = [stretches[0]]
    for index, kind in enumerate(kinds):
        if is_seam and index == work.model.num_double_blocks:
            line.append(stretches[1 + first_single])
        line.append(exact.get(index, stands_for[kind]))
    line.append(stretches[-1])
    before = peak = 0
    for part in line:
        peak = max(peak, before + part.working)
        before += part.kept
    host, made = (sum(getattr(part, name) for part in line) for name in ("host", "made"))
    return Activations(before, peak, host, made)


Kind = tuple[bool, str, bool, tuple[ExpertsConfig | None, ...]]


def _kinds(model: MMDiTConfig, modes: Sequence[str]) -> Iterator[Kind]:
    """(is a joint block, mode, is the last joint block, experts): what its memory depends on."""
    for index, mode in enumerate(modes):
        is_joint = index < model.num_double_blocks
        if is_joint:
            experts = tuple(model.experts_in(name, index) for name in model.streams)
        else:
            experts = (model.experts_in(SINGLE, index - model.num_double_blocks),)
        yield is_joint, mode, index == model.num_double_blocks - 1, experts


def _representatives(kinds: Sequence[Kind]) -> list[int]:
    """Of each kind the first two blocks and the last one: the ends have neighbours of their own."""
    places: dict[Kind, list[int]] = {}
    for index, kind in enumerate(kinds):
        places.setdefault(kind, []).append(index)
    return sorted({index for found in places.values() for index in (*found[:2], found[-1])})
