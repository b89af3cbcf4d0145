"""Tasks: what each token of a sample is for, declared in a recipe and drawn by weight per sample.

A task says of every stream whether it is generated, given, left out, or pure noise; which part of a
generated stream is given; which noise levels there are; and who sees whom. It never says how: the
same packing, model, objective and sampler serve all of them (`kinodit.data.assignment`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from kinodit.models.errors import ConfigError, UserError
from kinodit.models.random import sample_generator, uniform
from kinodit.models.tokens import SampleKey

Use = Literal["target", "clean", "noise", "absent"]
Given = Literal["none", "prefix", "suffix", "ends", "every", "random", "at", "inside", "outside"]
Levels = Literal["sample", "stream", "frame"]
References = Literal["absent", "clean", "target"]
Features = Mapping[str, Tensor]


class TaskError(UserError):
    """A sample that no task of the recipe fits."""


@dataclass(frozen=True)
class StreamTask:
    """What a task makes of one stream of a sample.

    Frames are rows of patches in time, and the pictures of a group.

    use:         target: noised, with a loss. clean: a condition, as it is. noise: pure noise, which
                 tells the others nothing (a marginal of UniDiffuser, arXiv 2303.06555, section
                 3.2). absent: not there; of text, the empty caption
    given:       the part of a target that is clean: its first frames (prefix), its last (suffix),
                 both (ends), every n-th from the first (every), n drawn ones (random), those of
                 `at`, what lies inside of a box in all frames (outpainting), or outside of it
                 (inpainting). One frame at least stays to be generated: of a sample of one frame
                 none is given, and a box that is the whole frame gives nothing
    frames:      least and most of n, drawn evenly
    at:          frames from the first (0, 1, ...) or from the last (-1, -2, ...)
    area:        least and most of the box's share of a frame, drawn evenly
    box:         (top, left, height, width) in parts of a frame; empty: drawn
    dropout:     share of samples in which what is clean of the stream is not: a clean stream is
                 absent then, what is given of a target is generated. What guidance needs; of text
                 it comes on top of objective.condition_dropout
    loss_weight: of the stream's targets; 0: noised, without a loss
    references:  the pictures that a sample brings along, before the stream's first frame: left out;
                 given whatever else is (in-context editing; `dropout` leaves them out, too); or
                 generated with it, as a group. Of the last two, the task is for samples with some
    """

    use: Use = "target"
    given: Given = "none"
    frames: tuple[int, int] = (1, 1)
    at: tuple[int, ...] = ()
    area: tuple[float, float] = (0.25, 0.5)
    box: tuple[float, ...] = ()
    dropout: float = 0.0
    loss_weight: float = 1.0
    references: References = "absent"

    def __post_init__(self) -> None:
        if self.references != "absent" and self.use != "target":
            raise ConfigError(
                f"references: {self.references} belong to what is generated, but use: {self.use} "
                "generates nothing: leave one of them out"
            )
        if self.given != "none" and self.use != "target":
            raise ConfigError(
                f"given: {self.given} is a part of what is generated, but use: {self.use} has the "
                "whole stream otherwise: leave one of them out"
            )
        least, most = self.frames
        if not 1 <= least <= most or (self.given == "every" and least < 2):
            raise ConfigError(
                f"frames: {list(self.frames)} must be the least and the most, from "
                f"{2 if self.given == 'every' else 1}"
            )
        if (self.given == "at") != bool(self.at):
            raise ConfigError(
                f"given: {self.given} with at: {list(self.at)}: `at` lists the frames of given: at"
            )
        low, high = self.area
        if not 0 < low <= high < 1:
            raise ConfigError(f"area: {list(self.area)} must rise, and lie between 0 and 1")
        if self.box and (
            len(self.box) != 4
            or min(self.box) < 0
            or min(self.box[2:]) <= 0
            or max(self.box[0] + self.box[2], self.box[1] + self.box[3]) > 1
        ):
            raise ConfigError(
                f"box: {list(self.box)} must be (top, left, height, width) in parts of a frame, "
                "within it"
            )
        if not 0 <= self.dropout <= 1:
            raise ConfigError(f"dropout: {self.dropout} must be 0 to 1")
        if not self.loss_weight >= 0:
            raise ConfigError(f"loss_weight: {self.loss_weight} must not be negative")


def pooled_name(text: str) -> str:
    """The condition vector that comes with a stream of text."""
    return f"{text}_pooled"


TARGET, CLEAN = StreamTask(), StreamTask(use="clean")


@dataclass(frozen=True)
class TaskConfig:
    """A task of a recipe.

    weight:  share of the samples, relative to the other tasks
    streams: stream -> what it is for. Streams that are not named are targets, text a condition
    levels:  noise levels of a sample: one (sample), one for each stream (UniDiffuser), or one for
             each frame of each stream (Diffusion Forcing, arXiv 2407.01392)
    block_s: seconds of a block, above 0: blocks are generated one after the other, each with a
             level of its own, and see the blocks before them clean (ACDiT, arXiv 2412.07720,
             section 3.2: the skip-causal mask). Twice the tokens, less one block
    context: how many blocks before it a block sees; 0: all
    one_way: clean tokens do not see noised ones
    hidden:  stream -> streams that its tokens do not see
    """

    weight: float = 1.0
    streams: dict[str, StreamTask] = field(default_factory=dict)
    levels: Levels = "sample"
    block_s: float = 0.0
    context: int = 0
    one_way: bool = False
    hidden: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"weight: {self.weight} must be a positive number")
        if not 0 <= self.block_s < float("inf"):
            raise ConfigError(f"block_s: {self.block_s} must be 0 or a number of seconds")
        if self.context < 0 or (self.context and not self.block_s):
            raise ConfigError(
                f"context: {self.context} is a number of blocks, and needs block_s; 0 is all blocks"
            )
        given = [name for name, stream in self.streams.items() if stream.given != "none"]
        if self.block_s and given:
            raise ConfigError(
                f"block_s: {self.block_s} with streams.{given[0]}.given: blocks are given by the "
                "blocks before them; leave one of them out"
            )
        after = [name for name, stream in self.streams.items() if stream.references != "absent"]
        if self.block_s and after:
            raise ConfigError(
                f"block_s: {self.block_s} with streams.{after[0]}.references: blocks begin with "
                "the clip; leave one of them out"
            )
        alone = [name for name, others in self.hidden.items() if name in others]
        if alone:
            raise ConfigError(f"hidden: {alone[0]} must see itself")

    @property
    def is_restricted(self) -> bool:
        """Whether some token does not see some other of its sample."""
        return self.block_s > 0 or self.one_way or bool(self.hidden)

    @property
    def most_tokens(self) -> int:
        """By how much a sample's tokens grow, at most."""
        return 2 if self.block_s else 1

    def stream(self, name: str, is_text: bool) -> StreamTask:
        """What the task makes of a stream."""
        return self.streams.get(name, CLEAN if is_text else TARGET)

    def fits(self, media: Iterable[str], references: Iterable[str] = ()) -> bool:
        """Whether a sample with these streams has something to generate, and all that is given.

        `references`: the streams of which it brings reference pictures along.
        """
        present = set(media)
        has_target = any(self.stream(name, False).use == "target" for name in present)
        clean = {name for name, stream in self.streams.items() if stream.use == "clean"}
        return has_target and clean <= present and self.wanting <= set(references)

    @property
    def wanting(self) -> set[str]:
        """Streams of which it takes reference pictures."""
        return {name for name, stream in self.streams.items() if stream.references != "absent"}


@dataclass(frozen=True)
class RegionConfig:
    """What of a clip is given, where a task leaves it open; what is empty is drawn.

    box:    (top, left, height, width) in parts of a frame, for tasks of a box
    frames: how many frames, for tasks that count them
    at:     which frames, from the first (0, 1, ...) or the last (-1, ...), for tasks of frames
    """

    box: tuple[float, ...] = ()
    frames: int = 0
    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.frames < 0 or (self.frames and self.at):
            raise ConfigError(
                f"frames: {self.frames} with at: {list(self.at)}: give how many frames, or which"
            )

    def of(self, task: TaskConfig) -> TaskConfig:
        """The task with that region. Raises ConfigError if it has no such region."""
        streams = {name: self._of_stream(stream) for name, stream in task.streams.items()}
        wanted = [name for name in ("box", "frames", "at") if getattr(self, name)]
        if wanted and streams == task.streams:
            value = getattr(self, wanted[0])
            raise ConfigError(
                f"{wanted[0]}: {list(value) if isinstance(value, tuple) else value}: the task "
                "gives no part of a stream that this says, or already says so"
            )
        return replace(task, streams=streams)

    def _of_stream(self, stream: StreamTask) -> StreamTask:
        if stream.given in ("inside", "outside"):
            return replace(stream, box=self.box) if self.box else stream
        if stream.given == "none":
            return stream
        if self.at:
            return replace(stream, given="at", at=self.at)
        if self.frames and stream.given != "at":
            return replace(stream, frames=(self.frames, self.frames))
        return stream


@dataclass(frozen=True)
class DrawnTask:
    """A task as a sample has it. What it leaves open is drawn by `seed` and the sample's key."""

    name: str
    config: TaskConfig
    seed: int


def draw_task(
    tasks: Mapping[str, TaskConfig],
    seed: int,
    key: SampleKey,
    media: Iterable[str],
    references: Iterable[str] = (),
) -> DrawnTask:
    """One of the tasks that fit a sample with these streams, by weight: a pure function.

    `references`: the streams of which it brings reference pictures along.

    Raises:
        TaskError: none fits.
    """
    media, references = sorted(media), sorted(references)
    fitting = {name: task for name, task in tasks.items() if task.fits(media, references)}
    if not fitting:
        raise TaskError(
            f"no task of the recipe fits sample {key.sample}, which has {', '.join(media)} and "
            f"{'some' if references else 'no'} reference pictures: of "
            f"{', '.join(tasks)} none generates one of these and is given only these. Add a task, "
            "or leave such samples out by data.datasets.NAME.where"
        )
    total = sum(task.weight for task in fitting.values())
    left = uniform(sample_generator(seed, key, "task")) * total
    for name, task in fitting.items():
        chosen = name
        left -= task.weight
        if left < 0:
            break
    return DrawnTask(chosen, fitting[chosen], seed)


def is_dropped(task: DrawnTask, key: SampleKey, stream: str, dropout: float) -> bool:
    """Whether what is clean of a stream is left out: drawn for each stream by itself."""
    return uniform(sample_generator(task.seed, key, f"task/dropout/{stream}")) < dropout


def check_tasks(tasks: Mapping[str, TaskConfig], outputs: Mapping[str, bool]) -> None:
    """Raises ConfigError if tasks name streams that there are not, or generate what none can.

    `outputs`: stream -> whether the model has a head for it.
    """
    for name, task in tasks.items():
        others = [other for hidden in task.hidden.values() for other in hidden]
        unknown = [s for s in (*task.streams, *task.hidden, *others) if s not in outputs]
        if unknown:
            raise ConfigError(
                f"tasks.{name} names the stream {unknown[0]!r}; model.streams are {list(outputs)}"
            )
        for stream, has_head in outputs.items():
            use = task.stream(stream, not has_head).use
            if use in ("target", "noise") and not has_head:
                raise ConfigError(
                    f"tasks.{name}.streams.{stream}.use: {use} needs a stream that is generated, "
                    f"but model.streams.{stream}.output is false: use clean or absent"
                )
        generated = [stream for stream, has_head in outputs.items() if has_head]
        if not task.fits(generated, generated):
            raise ConfigError(f"tasks.{name} generates nothing: give one stream use: target")


@dataclass(frozen=True)
class TaskMix:
    """The tasks of a recipe.

    seed:  of the run
    empty: gives features {stream: [L, C]} and condition vectors {name: [D]} of the empty caption
    """

    tasks: Mapping[str, TaskConfig]
    seed: int
    empty: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]

    def draw(
        self, key: SampleKey, media: Iterable[str], references: Iterable[str] = ()
    ) -> DrawnTask | None:
        """The task of a sample; None if the recipe has none."""
        return draw_task(self.tasks, self.seed, key, media, references) if self.tasks else None

    def captions(
        self,
        task: DrawnTask,
        key: SampleKey,
        text: Mapping[str, Tensor],
        conditions: Mapping[str, Tensor],
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Text features and condition vectors as the task has them.

        A text stream that is absent or dropped has those of the empty caption, and so have the
        vectors that come with it (`STREAM_pooled`).
        """
        for name in text:
            stream = task.config.stream(name, True)
            if stream.use != "absent" and not is_dropped(task, key, name, stream.dropout):
                continue
            text, conditions = with_empty(name, text, conditions, self.empty())
        return text, conditions


def with_empty(
    name: str, text: Features, conditions: Features, empty: tuple[Features, Features]
) -> tuple[Features, Features]:
    """Text features and condition vectors with one stream's own of the empty caption."""
    empty_text, empty_conditions = empty
    own = {c: v for c, v in empty_conditions.items() if c == pooled_name(name)}
    return {**text, name: empty_text[name]}, {**conditions, **own}
