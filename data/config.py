"""The `data` section of a recipe: which samples, how they are decoded, how a step is filled."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kinodit.data.expression import parse
from kinodit.data.meta import MAX_REFERENCES
from kinodit.models.errors import ConfigError


@dataclass(frozen=True)
class RangeConfig:
    """An interval of a number, both ends included; an end that is left out is open."""

    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ConfigError(f"a range has min {self.min} above max {self.max}: swap them")


@dataclass(frozen=True)
class WhereConfig:
    """Which samples of a dataset take part; all conditions must hold.

    modality:   "video", "image" or "audio"; all if left out
    has_audio:  with sound (true) or without (false)
    num_frames, duration_s, fps, height, width: of the source, before any resizing
    scores:     numbers of the record, by name; a sample without the score does not pass
    extra:      strings of the record that must be equal, by name; likewise. Scores and extras are
                not in the index: asking for one reads the metadata of every sample once at start
    """

    modality: Literal["video", "image", "audio"] | None = None
    has_audio: bool | None = None
    num_frames: RangeConfig = field(default_factory=RangeConfig)
    duration_s: RangeConfig = field(default_factory=RangeConfig)
    fps: RangeConfig = field(default_factory=RangeConfig)
    height: RangeConfig = field(default_factory=RangeConfig)
    width: RangeConfig = field(default_factory=RangeConfig)
    scores: dict[str, RangeConfig] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamConfig:
    """Archives that cannot be read by offset: compressed ones, and those of servers without ranges.

    They are read one after the other through webdataset, and the run is not exact: which samples
    are used, and how often, depends on ranks, threads and restarts.

    shards:         names of the archives below the dataset's path, {00..31} written out; .tar,
                    .tar.gz, .tgz, .tar.bz2 or .tar.xz. Empty: the dataset is no stream
    num_samples:    how many samples count as one time through it
    modality:       of all its samples: what they cost is planned before any is read
    has_audio:      whether its videos have sound
    shuffle_buffer: samples among which the next one is drawn; they are held in memory
    """

    shards: tuple[str, ...] = ()
    num_samples: int = 0
    modality: Literal["video", "image", "audio"] = "video"
    has_audio: bool = False
    shuffle_buffer: int = 256

    def __post_init__(self) -> None:
        if self.shards:
            _require_positive("datasets.*.stream.num_samples", self.num_samples)
            _require_positive("datasets.*.stream.shuffle_buffer", self.shuffle_buffer)


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of the mixture.

    path:   folder with `manifest.json`, or its URL: http(s)://, s3:// and others of fsspec
    weight: its share of the samples, relative to the other datasets
    where:  which of its samples take part
    filter: the same as an expression, for example "short_side >= 480 and scores.motion > 0.1"
            (`kinodit.data.expression`); both must hold
    repeat: instead of a weight: how often each of its samples comes while those of the other
            datasets come as often as their `repeat` says; all datasets have one, or none
    max_samples: take part at most so many, drawn once for all runs
    max_epochs:  it is an error if the run would go through it more often
    cache:  folder that `kinodit data encode` made of it: samples that are there are not decoded
    stream: its archives, where they cannot be read by offset
    """

    path: str = ""
    weight: float = 1.0
    where: WhereConfig = field(default_factory=WhereConfig)
    filter: str = ""
    repeat: float | None = None
    max_samples: int | None = None
    max_epochs: float | None = None
    cache: str = ""
    stream: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        for name in ("repeat", "max_samples", "max_epochs"):
            value = getattr(self, name)
            if value is not None:
                _require_positive(f"datasets.*.{name}", value)
        if self.repeat is not None and self.weight != 1.0:
            raise ConfigError(
                f"a dataset has repeat {self.repeat:g} and weight {self.weight:g}: its share "
                "follows from one of them, so leave out the other"
            )
        if self.filter:
            parse(self.filter)
        if self.stream.shards and (
            self.where != WhereConfig() or self.filter or self.cache or self.max_samples
        ):
            raise ConfigError(
                f"the dataset at {self.path} is streamed: where, filter, max_samples and cache "
                "need an index (`kinodit data index`), so leave them out"
            )


@dataclass(frozen=True)
class DecodeConfig:
    """What a sample is decoded to.

    height, width:    pixels; the picture is scaled to cover them, then cropped
    num_frames:       frames of a video (an image has one)
    fps:              frames per second of a video; source frames are picked, or held if too few
    window:           where in a longer clip the frames begin: a keyed draw, or its first frame
    crop:             where the crop lies: in the middle, or a keyed draw
    use_video:        decode pictures; off, only samples with sound take part, for it alone
    pixels:           what videos are until they are encoded: "rgb", or "yuv420", as they are coded,
                      in half the bytes: sizes are even then, and the device converts. Still images
                      are RGB
    use_audio:        decode the sound of videos and audio-only samples; off, it is never opened
    audio_rate:       Hz
    audio_channels:   1 or 2
    max_references:   reference pictures that a sample may bring along, decoded to its own height
                      and width; 0: they are not decoded. A sample with more is refused. Every
                      sample is planned as if it had so many
    max_pixels:       largest source picture, height x width; larger ones are refused unread
    max_duration_s:   longest source, seconds; likewise
    max_frames:       most frames of a source; likewise
    decode_limit_s:   longest that decoding one sample may take, seconds
    """

    height: int = 64
    width: int = 64
    num_frames: int = 16
    fps: float = 8.0
    window: Literal["random", "first"] = "random"
    crop: Literal["centre", "random"] = "centre"
    pixels: Literal["rgb", "yuv420"] = "rgb"
    use_video: bool = True
    use_audio: bool = False
    audio_rate: int = 16_000
    audio_channels: int = 1
    max_references: int = 0
    max_pixels: int = 8192 * 8192
    max_duration_s: float = 3600.0
    max_frames: int = 1_000_000
    decode_limit_s: float = 60.0

    def __post_init__(self) -> None:
        counts = ("height", "width", "num_frames", "fps")
        for name in (*counts, "max_pixels", "max_duration_s", "max_frames", "decode_limit_s"):
            _require_positive(name, getattr(self, name))
        if not (self.use_video or self.use_audio):
            raise ConfigError("data.use_video and data.use_audio are both false: nothing is left")
        if self.pixels == "yuv420" and (self.height % 2 or self.width % 2):
            raise ConfigError(
                f"data.height x width is {self.height} x {self.width}; with data.pixels=yuv420 "
                "both are even"
            )
        if not 1000 <= self.audio_rate <= 192_000:
            raise ConfigError(f"data.audio_rate is {self.audio_rate} Hz; it must be 1000 to 192000")
        if not 0 <= self.max_references <= (MAX_REFERENCES if self.use_video else 0):
            raise ConfigError(
                f"data.max_references is {self.max_references}; it must be 0 to {MAX_REFERENCES}, "
                "and 0 with data.use_video=false"
            )
        if self.audio_channels not in (1, 2):
            raise ConfigError(f"data.audio_channels is {self.audio_channels}; it must be 1 or 2")

    @property
    def window_s(self) -> float:
        """Seconds that the frames of a video last."""
        return self.num_frames / self.fps


@dataclass(frozen=True)
class QuarantineConfig:
    """How many bad samples a run puts up with.

    max_attempts:    samples tried for one place of a step, the wanted one among them
    max_step_share:  share of a step's samples that may be substitutes (one always may)
    max_shard_share: share of a shard's samples that may be bad (two always may)
    """

    max_attempts: int = 8
    max_step_share: float = 0.25
    max_shard_share: float = 0.1

    def __post_init__(self) -> None:
        if self.max_attempts < 2:
            raise ConfigError(
                f"data.quarantine.max_attempts is {self.max_attempts}; a substitute needs 2 "
                "(data.on_error=fail ends the run at the first bad sample)"
            )
        for name in ("max_step_share", "max_shard_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"data.quarantine.{name} is {getattr(self, name)}; a share is 0 to 1"
                )


@dataclass(frozen=True)
class StorageConfig:
    """How remote shards are read.

    attempts:        how often a read is tried that fails for a reason that may pass
    attempt_limit_s: how long one attempt may take, seconds
    wait_s:          pause after the first failure, seconds; each further one is twice as long
    max_wait_s:      longest pause, seconds
    cache_dir:       a folder on the node's own disk, shared by its ranks; left out, one in TMPDIR.
                     Manifests and indexes are kept there, too
    cache_gib:       most that blocks of shards may take there, GiB; 0 reads every sample by itself
    block_mib:       bytes that are fetched and kept together, MiB
    """

    attempts: int = 8
    attempt_limit_s: float = 60.0
    wait_s: float = 0.5
    max_wait_s: float = 30.0
    cache_dir: str = ""
    cache_gib: float = 0.0
    block_mib: float = 8.0

    def __post_init__(self) -> None:
        for name in ("attempts", "attempt_limit_s", "wait_s", "max_wait_s", "block_mib"):
            _require_positive(f"storage.{name}", getattr(self, name))
        if not 0 <= self.cache_gib < float("inf"):
            raise ConfigError(f"data.storage.cache_gib is {self.cache_gib}; 0 turns it off")

    @property
    def folder(self) -> Path:
        """Where manifests and blocks are kept."""
        if self.cache_dir:
            return Path(self.cache_dir)
        return Path(tempfile.gettempdir()) / f"kinodit-{os.getuid()}"


@dataclass(frozen=True)
class DataConfig(DecodeConfig):
    """The data stream: the mixture, the size of a step, and the loader.

    Beside the fields of `DecodeConfig`:

    datasets:         name -> dataset; the name is part of every draw's key, the path is not
    samples_per_step: samples of one optimizer step, over all ranks
    packs_per_step:   packs these are put into, over all ranks. Fixed by the recipe, never by the
                      number of ranks; a rank without a pack of its own runs an empty one
    token_budget:     most tokens of one pack, text included; left out, what the worst step needs
    packing:          "count": exactly `packs_per_step` packs; "budget": rounds of `packs_per_step`
                      packs, as many as the budgets ask for, balanced by cost; "class": the same,
                      but a round has samples of one size only
    cost_budget:      most cost of a pack: tokens, and attention in the same unit; left out, packs
                      are bounded by their tokens only
    window_steps:     steps whose samples are put into rounds together, and then dealt out to the
                      steps: the more, the more alike are the packs of a round
    shuffle:          "full": every epoch in any order; "block": samples of about `block_shards`
                      shards are mixed, so that a step reads from few of them; "auto": block for
                      datasets that are not on a file system, full for the others
    block_shards:     shards that are mixed with shuffle=block
    sizes:            "recipe": every sample has the recipe's height, width and length; "own": each
                      keeps its aspect ratio, within height x width pixels, and its length, within
                      num_frames
    lengths:          with sizes=own, the frames that clips may have; left out, all that the codec
                      takes. Few lengths and a coarse side_multiple make few classes
    side_multiple:    with sizes=own, sides are cut to multiples of so many pixels, and of a token's
    too_long:         with sizes=own, what a clip of more than num_frames does: "window" trains on
                      a window of it, "error" ends the run before it starts
    num_threads:      samples that each rank reads and decodes at once
    workers:          where they are decoded: each in a process of its own, which is killed at
                      `decode_limit_s` and replaced when a medium makes it crash; or in threads,
                      where a decoder is asked to stop, and one that does not hear it, or crashes,
                      ends the run. Without media to decode there are no processes
    prefetch_steps:   steps decoded ahead of the one in use
    cache_mib:        memory for decoded samples that are used again, and as much for their latents,
                      per rank, MiB; 0 is none
    on_error:         what a sample does that cannot be used: "substitute" puts another one of its
                      cost in its place, by a rule that every rank and every restart follows alike,
                      and writes it to RUN/quarantine.jsonl; "fail" ends the run with its name
    quarantine:       how many bad samples are too many
    storage:          how shards are read that lie elsewhere
    """

    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    samples_per_step: int = 8
    packs_per_step: int = 1
    token_budget: int | None = None
    packing: Literal["count", "budget", "class"] = "count"
    cost_budget: int | None = None
    window_steps: int = 1
    shuffle: Literal["auto", "full", "block"] = "auto"
    block_shards: int = 16
    sizes: Literal["recipe", "own"] = "recipe"
    lengths: tuple[int, ...] = ()
    side_multiple: int = 1
    too_long: Literal["window", "error"] = "window"
    num_threads: int = 2
    workers: Literal["threads", "processes"] = "processes"
    prefetch_steps: int = 2
    cache_mib: int = 0
    on_error: Literal["fail", "substitute"] = "substitute"
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "samples_per_step", "packs_per_step", "num_threads", "prefetch_steps", "window_steps",
            "side_multiple", "block_shards",
        ):  # fmt: skip
            _require_positive(name, getattr(self, name))
        if self.window_steps > 1 and self.packing == "count":
            raise ConfigError(
                f"data.window_steps={self.window_steps} is for data.packing=budget or class; with "
                "count every step is filled by itself: leave it out"
            )
        if self.cost_budget is not None:
            _require_positive("cost_budget", self.cost_budget)
            if self.packing == "count":
                raise ConfigError(
                    "data.cost_budget is for data.packing=budget or class: with count, the packs "
                    "are as many as data.packs_per_step says, whatever they cost"
                )
        if self.cache_mib < 0:
            raise ConfigError(f"data.cache_mib is {self.cache_mib}; 0 turns the cache off")
        if self.token_budget is not None:
            _require_positive("token_budget", self.token_budget)
        repeats = [dataset.repeat is not None for dataset in self.datasets.values()]
        if any(repeats) and not all(repeats):
            raise ConfigError(
                "some datasets have a repeat and some do not: shares follow from the repeats of "
                "all datasets, or from the weights of all"
            )
        for name, dataset in self.datasets.items():
            if not dataset.path:
                raise ConfigError(f"data.datasets.{name} has no path: give its folder of shards")
            if dataset.stream.shards and self.sizes == "own":
                raise ConfigError(
                    f"data.datasets.{name} is streamed: with data.sizes=own the size of a sample "
                    "must be known before it is read; use data.sizes=recipe, or index it"
                )


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"data.{name} is {value}; it must be a positive number")
