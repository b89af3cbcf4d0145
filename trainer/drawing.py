"""One sample drawn by a task: whatever is given, whatever is generated, under every condition.

Shape legend: C channels of a latent, t/h/w latent frames, rows and columns, N tokens of a stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kinodit.data.encode import SampleEncoder
from kinodit.data.packing import EncodedSample, PackSpec, filler, pack, patch_grid, unpatchify
from kinodit.data.tasks import DrawnTask, Features, StreamTask, TaskConfig, with_empty
from kinodit.models.diffusion.field import Network, velocity_field
from kinodit.models.diffusion.guidance import TEXT, GuidanceConfig, guided, guiding
from kinodit.models.diffusion.objective import Objective
from kinodit.models.diffusion.rollout import Blocks, roll_out
from kinodit.models.diffusion.samplers import SamplerConfig, VelocityFn, sample, time_grid
from kinodit.models.diffusion.windows import Rows, WindowConfig, windowed
from kinodit.models.errors import UserError
from kinodit.models.parts import can_remember
from kinodit.models.random import generator, normal
from kinodit.models.tokens import Role, SampleKey, TokenBatch

Grid = tuple[int, int, int]
ALL = ""
"""The batch from which no condition is taken away."""
REFERENCES = "references"
"""The condition of reference pictures, beside those of streams."""
PROMPT_SEPARATOR = "|"
"""Between prompts of a clip that is drawn in windows."""


class GivenMediaError(UserError):
    """A task that is given something which was not there."""


@dataclass(frozen=True)
class Order:
    """What to draw.

    prompt:  None: nothing, by ranks that have no clip of their own while the others draw theirs
    grids:   stream -> latent frames, rows and columns
    seconds: stream -> seconds from one latent frame to the next
    task:    None: everything from the prompt
    given:   stream -> latents [C, t, h, w], of which the task takes what it is given
    seed:    of the noise; with index and prompt it decides the sample
    references: stream -> latents [C, t, h, w] of pictures before its first frame; of those that the
             task draws, the shapes
    """

    prompt: str | None
    index: int
    grids: Mapping[str, Grid]
    seconds: Mapping[str, float]
    task: DrawnTask | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    references: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def stream(self, name: str, is_text: bool = False) -> StreamTask:
        """What the task makes of a stream."""
        return (TaskConfig() if self.task is None else self.task.config).stream(name, is_text)


@dataclass
class Drawing:
    """Draws samples with a network.

    model:    what `network` calls
    dtype:    of the latents between evaluations
    shift:    of the time grid
    negative: the caption of the pass without the prompt
    tell:     is given how many steps of the time grid are done, whenever that is known
    """

    network: Network
    model: nn.Module
    objective: Objective
    encoder: SampleEncoder
    spec: PackSpec
    device: torch.device
    dtype: torch.dtype
    sampler: SamplerConfig
    guidance: GuidanceConfig
    window: WindowConfig
    shift: float
    negative: str = ""
    tell: Callable[[int], None] = lambda done: None

    def __call__(self, order: Order) -> dict[str, Tensor]:
        """Stream -> latents [C, t, h, w], generated or given; nothing without a prompt. Collective.

        Reference pictures that were drawn with a stream are named "STREAM/0", "STREAM/1", ...

        Raises:
            GivenMediaError: the task is given a stream or pictures that `order` lacks.
        """
        is_idle = order.prompt is None
        if is_idle and (order.task is not None or self.window.length_s):
            # How many passes there are depends on the tokens: as many are made as for a clip.
            order = replace(order, prompt="")
        _check_given(order)
        cuts = self._cuts(order)
        spoken = () if order.prompt is None else (*(cut.prompt for cut in cuts), self.negative)
        self.encoder.prepare(spoken)
        batches = [self._batches(order, cut) for cut in cuts]
        whole = batches[0][ALL] if len(cuts) == 1 else self._batch(order, cuts[0].whole(order), ALL)
        start = self._start(whole, order)
        if order.task is not None and order.task.config.block_s:
            tokens = self._by_blocks(batches[0], start)
        else:
            velocities = [self._velocity(some) for some in batches]
            velocity = self._told(windowed(velocities, [cut.rows for cut in cuts]))
            tokens = sample(velocity, start, self._times, self.sampler.method)
        return {} if is_idle else self._latents(whole, tokens, order)

    @property
    def _times(self) -> Tensor:
        return time_grid(self.sampler.steps, self.sampler.shift or self.shift)

    def _told(self, velocity: VelocityFn) -> VelocityFn:
        """`velocity`, which tells how far the time grid is done whenever it is asked."""
        times = self._times.tolist()
        is_down = times[0] > times[-1]

        def told(x: Mapping[str, Tensor], t: float) -> Mapping[str, Tensor]:
            self.tell(sum(known > t if is_down else known < t for known in times[:-1]))
            return velocity(x, t)

        return told

    def _velocity(self, batches: Mapping[str, TokenBatch]) -> VelocityFn:
        """The guided velocity of a batch under every condition, and without each."""
        passes = {
            name: velocity_field(self.network, self.objective, batch)
            for name, batch in batches.items()
        }
        if REFERENCES in passes:
            counts = {
                name: tokens.num_tokens - batches[REFERENCES].modalities[name].num_tokens
                for name, tokens in batches[ALL].modalities.items()
            }
            passes[REFERENCES] = _padded(passes[REFERENCES], counts)
        return guided(passes.pop(ALL), passes, self.guidance, batches[ALL])

    def _by_blocks(
        self, batches: Mapping[str, TokenBatch], start: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Tokens of the whole batch, drawn block after block."""
        model = self.model if can_remember(self.model) else None
        blocks = [Blocks(self.network, self.objective, one, model) for one in batches.values()]

        def combine(velocities: Sequence[VelocityFn], part: TokenBatch) -> VelocityFn:
            passes = dict(zip(batches, velocities, strict=True))
            return guided(passes.pop(ALL), passes, self.guidance, part)

        return roll_out(blocks, combine, start, self._times, self.sampler.method)

    def _cuts(self, order: Order) -> list[Cut]:
        """The windows of a clip; one if that is enough, or if it is drawn in blocks."""
        total_s = max(order.grids[name][0] * order.seconds[name] for name in order.grids)
        starts_s = self.window.starts_s(total_s)
        if len(starts_s) > 1 and order.task is not None and order.task.config.block_s:
            raise GivenMediaError(
                f"sample.window.length_s={self.window.length_s:g} with a task of block_s="
                f"{order.task.config.block_s:g}: blocks reach any length by themselves; set "
                "sample.window.length_s=0"
            )
        if len(starts_s) > 1 and order.references:
            raise GivenMediaError(
                f"sample.window.length_s={self.window.length_s:g} with reference pictures, which "
                "are before the first window alone: set sample.window.length_s=0"
            )
        return [
            cut_of(order, self.spec, start_s, self.window.length_s, total_s) for start_s in starts_s
        ]

    def _batches(self, order: Order, cut: Cut) -> dict[str, TokenBatch]:
        """The batch of a window under every condition (`ALL`), and without each that is guided."""
        generated = [name for name in order.grids if order.stream(name).use == "target"]
        known = {stream.name for stream in self.spec.streams if stream.patch is not None}
        unknown = self.guidance.conditions.keys() - known - {REFERENCES}
        if unknown:
            raise GivenMediaError(
                f"sample.guidance.conditions names {min(unknown)!r}; conditions with a scale there "
                f"are {', '.join(sorted(known))} and {REFERENCES}"
            )
        without = guiding(self.guidance, generated)
        if not any(order.stream(name).references == "clean" for name in generated):
            without = [name for name in without if name != REFERENCES]
        if order.task is not None and order.task.config.stream(TEXT, True).use == "absent":
            without = [name for name in without if name != TEXT]
        return {name: self._batch(order, cut, name) for name in (ALL, *without)}

    def _batch(self, order: Order, cut: Cut, without: str) -> TokenBatch:
        """A pack of one segment: latents are what is given, or zeros of the right shape."""
        if order.prompt is None:
            return filler(self.spec).to(self.device)
        task = order.task
        caption = self.negative if without == TEXT else cut.prompt
        text: Features
        conditions: Features
        empty, (text, conditions) = self.encoder.text(""), self.encoder.text(caption)
        for name in tuple(text):
            if order.stream(name, True).use == "absent":
                text, conditions = with_empty(name, text, conditions, empty)
        if without == REFERENCES:
            assert task is not None
            alone = {n: replace(s, references="absent") for n, s in task.config.streams.items()}
            task = replace(task, config=replace(task.config, streams=alone))
        if without in cut.grids:
            config = TaskConfig() if task is None else task.config
            streams = {**config.streams, without: StreamTask(use=self.guidance.without)}
            task = DrawnTask("without", replace(config, streams=streams), order.seed)
        latents = {}
        for stream in self.spec.streams:
            if stream.name in cut.grids:
                first, grid = cut.first[stream.name], cut.grids[stream.name]
                given = order.given.get(stream.name)
                if given is None:
                    latents[stream.name] = torch.zeros(stream.channels, *grid)
                else:
                    latents[stream.name] = given[:, first : first + grid[0]].cpu()
        encoded = EncodedSample(
            key=_key(order),
            latents=latents,
            seconds=order.seconds,
            text=text,
            conditions=conditions,
            task=task,
            references={
                name: [picture.cpu() for picture in order.references.get(name, ())]
                for name in latents
            },
        )
        return pack([encoded], self.spec).to(self.device)

    def _start(self, whole: TokenBatch, order: Order) -> dict[str, Tensor]:
        """Stream -> [N, C] of the streams that are generated: noise, and what is given of them."""
        start = {}
        for stream in self.spec.streams:
            tokens = whole.modalities[stream.name]
            is_noised_N1 = (tokens.role == int(Role.NOISED)).unsqueeze(-1)
            if stream.patch is None or not bool(is_noised_N1.any()):
                continue
            source = generator(order.seed, "sample", order.index, order.prompt or "", stream.name)
            noise = normal(source, tuple(tokens.latents.shape)).to(self.device, self.dtype)
            start[stream.name] = noise.where(is_noised_N1, tokens.latents.to(self.dtype))
        return start

    def given_cells(self, order: Order) -> dict[str, Tensor]:
        """Stream -> bool [t, h, w]: which cells of a generated stream the task gives.

        Nothing without a task, or with one of blocks, which gives no part of what it draws.
        """
        if order.prompt is None or order.task is None or order.task.config.block_s:
            return {}
        sample = EncodedSample(
            key=_key(order),
            latents={
                stream.name: torch.zeros(stream.channels, *order.grids[stream.name])
                for stream in self.spec.streams
                if stream.name in order.grids
            },
            seconds=order.seconds,
            text={},
            conditions={},
            task=order.task,
        )
        # What is said changes nothing of what is given: no caption is encoded a second time.
        whole, cells = pack([sample], PackSpec(self.spec.streams)), {}
        for stream in self.spec.streams:
            if stream.patch is None or stream.name not in order.grids:
                continue
            if order.stream(stream.name).use != "target":
                continue
            role_N = whole.modalities[stream.name].role
            grid = patch_grid((stream.channels, *order.grids[stream.name]), stream.patch)
            is_clean = (role_N == int(Role.CLEAN)).unsqueeze(-1)
            tokens = is_clean.expand(-1, math.prod(stream.patch))
            cells[stream.name] = unpatchify(tokens, grid, stream.patch)[0]
        return cells

    def _latents(
        self, whole: TokenBatch, tokens: Mapping[str, Tensor], order: Order
    ) -> dict[str, Tensor]:
        """Tokens as latents, those of streams that are given too."""
        latents = {}
        for stream in self.spec.streams:
            if stream.patch is None or stream.name not in order.grids:
                continue
            use = order.stream(stream.name).use
            if use not in ("target", "clean"):
                continue
            all_tokens = whole.modalities[stream.name]
            found = tokens.get(stream.name, all_tokens.latents)
            if use == "target" and order.task is not None and order.task.config.block_s:
                found = found[all_tokens.role == int(Role.NOISED)]
            shapes: list[Sequence[int]] = [(stream.channels, *order.grids[stream.name])]
            if order.stream(stream.name).references != "absent":
                pictures = order.references[stream.name]
                shapes = [*(picture.shape for picture in pictures), *shapes]
            grids = [patch_grid(shape, stream.patch) for shape in shapes]
            parts = found.split([math.prod(grid) for grid in grids])
            latents[stream.name] = unpatchify(parts[-1], grids[-1], stream.patch)
            if order.stream(stream.name).references == "target":
                for number, (part, grid) in enumerate(zip(parts[:-1], grids, strict=False)):
                    latents[f"{stream.name}/{number}"] = unpatchify(part, grid, stream.patch)
        return latents


def _padded(velocity: VelocityFn, counts: Mapping[str, int]) -> VelocityFn:
    """The velocity of tokens of which the first ones, so many of each stream, are not in a pass.

    They are clean, and stand still.
    """

    def padded(x: Mapping[str, Tensor], t: float) -> Mapping[str, Tensor]:
        found = velocity({name: part[counts[name] :] for name, part in x.items()}, t)
        return {
            name: torch.cat([torch.zeros_like(x[name][: counts[name]]), part])
            for name, part in found.items()
        }

    return padded


@dataclass(frozen=True)
class Cut:
    """A window of an order.

    grids:  stream -> latent frames, rows and columns of it
    first:  stream -> its first latent frame
    rows:   stream -> its tokens
    prompt: that of its middle
    """

    grids: Mapping[str, Grid]
    first: Mapping[str, int]
    rows: Rows
    prompt: str

    def whole(self, order: Order) -> Cut:
        """The whole clip."""
        return Cut(order.grids, dict.fromkeys(order.grids, 0), {}, self.prompt)


def cut_of(order: Order, spec: PackSpec, start_s: float, length_s: float, total_s: float) -> Cut:
    """The window of an order that begins at `start_s`; the whole clip if it is no longer."""
    prompts = [part.strip() for part in (order.prompt or "").split(PROMPT_SEPARATOR)]
    if not length_s or total_s <= length_s:
        rows = {name: slice(None) for name in order.grids}
        prompt = order.prompt or ""
        return Cut(order.grids, dict.fromkeys(order.grids, 0), rows, prompt)
    grids, first, rows = {}, {}, {}
    for stream in spec.streams:
        if stream.patch is None or stream.name not in order.grids:
            continue
        frames, height, width = order.grids[stream.name]
        step, per_frame = stream.patch[0], (height // stream.patch[1]) * (width // stream.patch[2])
        token_s = order.seconds[stream.name] * step
        count = min(max(1, round(length_s / token_s)), frames // step)
        begin = min(round(start_s / token_s), frames // step - count)
        grids[stream.name] = (count * step, height, width)
        first[stream.name] = begin * step
        rows[stream.name] = slice(begin * per_frame, (begin + count) * per_frame)
    middle = (start_s + length_s / 2) / total_s
    return Cut(grids, first, rows, prompts[min(int(middle * len(prompts)), len(prompts) - 1)])


def _key(order: Order) -> SampleKey:
    """By which a task draws what it leaves open."""
    return SampleKey(step=0, slot=order.index, sample="prompt")


def _check_given(order: Order) -> None:
    taken = [name for name in order.grids if order.stream(name).references != "absent"]
    if order.references and not taken:
        name = "" if order.task is None else f" {order.task.name!r}"
        raise GivenMediaError(
            f"there are reference pictures, but the task{name} takes none: name a task with "
            "references (sample.task, or --task NAME), or leave them out"
        )
    if order.task is None or order.prompt is None:
        return
    missing = [name for name in taken if not order.references.get(name)]
    if missing:
        raise GivenMediaError(
            f"the task {order.task.name!r} is given reference pictures, but there are none: name "
            "them (sample.references, or --reference FILE)"
        )
    for name in order.grids:
        stream = order.stream(name)
        if (stream.use == "clean" or stream.given != "none") and name not in order.given:
            raise GivenMediaError(
                f"the task {order.task.name!r} is given {name}, but there is none: name a file "
                f"that has {name} (sample.given, or --given FILE)"
            )
        if name in order.given and tuple(order.given[name].shape[1:]) != order.grids[name]:
            shape = " x ".join(map(str, order.given[name].shape[1:]))
            raise GivenMediaError(
                f"what is given of {name} has {shape} latent frames, rows and columns, the clip "
                f"{' x '.join(map(str, order.grids[name]))}: give as long a piece as is drawn"
            )
