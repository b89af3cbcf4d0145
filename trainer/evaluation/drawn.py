"""Clips drawn for the validation set, from captions alone or by a task, measured over all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinodit.data.decode import DecodedSample
from kinodit.data.encode import AUDIO, IMAGE, TEXT, VIDEO, SampleEncoder
from kinodit.data.tasks import RegionConfig, TaskConfig
from kinodit.models.encoders.features import Extractor
from kinodit.trainer.config import RunConfig
from kinodit.trainer.evaluation.edit import compare_edit
from kinodit.trainer.evaluation.figures import Measured, Media, figures_of, measure
from kinodit.trainer.evaluation.fill import compare_fill
from kinodit.trainer.evaluation.truth import Told
from kinodit.trainer.gallery import save_gallery
from kinodit.trainer.generate import Clip, ClipShape, SampleConfig, using_ema
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.setup import Parts, clip_shape, master_dtype, sampling_shift

NUM_SHOWN = 64
"""Samples that are kept as files."""
PICTURES_FOLDER = "pictures"
"""Of pictures that were drawn from captions, beside the clips."""


GivenOf = tuple[Mapping[str, Tensor], Sequence[Tensor]]
"""What a sample gives a task: stream -> latents, and latents of its reference pictures."""


@dataclass
class DrawnSamples:
    """Draws and measures. Every method is collective; figures are on rank 0.

    own:    this rank's samples of the validation set
    folder: for clips and their sheets
    progress: is given what is done, and how much of it
    """

    config: RunConfig
    parts: Parts
    encoder: SampleEncoder
    own: Sequence[DecodedSample]
    folder: Path
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None

    def from_captions(self) -> dict[str, Any]:
        """Clips as `sample` of the recipe has them, for the captions of the validation set.

        Without its task, if that is given more than captions, or draws pictures beside. Still
        images among the clips are drawn as such, and have figures of their own, "pictures".
        """
        shape, settings = clip_shape(self.config), self.config.sample
        task = self.config.tasks.get(settings.task)
        if task is not None and not takes_captions_alone(task):
            settings = dataclasses.replace(settings, task="", given="", region=RegionConfig())
        stills = [s for s in self.own if shape.num_frames > 1 and _is_still(s)]
        clips = [s for s in self.own if s not in stills]
        figures = self._figures(clips, settings, shape, self.folder, [])
        still = dataclasses.replace(shape, num_frames=1, num_samples=0)
        pictures = self._figures(stills, settings, still, self.folder / PICTURES_FOLDER, [])
        return {**figures, "pictures": pictures} if pictures["num_samples"] else figures

    def by_task(self, task: str) -> dict[str, Any]:
        """Clips of a task, which is given what it asks for of each sample that has it.

        Of a video that is given in part, "fill" says how near the rest is, beside a copy.
        """
        config = self.config.tasks[task]
        settings = dataclasses.replace(
            self.config.sample, task=task, given="", region=RegionConfig()
        )
        if config.stream(TEXT, True).use == "absent":
            settings = dataclasses.replace(settings, negative="")
        shape = clip_shape(self.config)
        grids = self.parts.generator(torch.float32).grids(shape)
        needed = [
            name
            for name in grids
            if config.stream(name, False).use == "clean"
            or config.stream(name, False).given != "none"
        ]
        fitting, given = [], []
        for sample, encoded in zip(self.own, self.encoder.encode(self.own), strict=True):
            if config.wanting <= encoded.references.keys() and all(
                name in encoded.latents and tuple(encoded.latents[name].shape[1:]) == grids[name]
                for name in needed
            ):
                fitting.append(sample)
                pictures = [p.cpu() for name in config.wanting for p in encoded.references[name]]
                latents = {name: encoded.latents[name].cpu() for name in needed}
                given.append((sample.key.slot, (latents, pictures)))
        folder = self.folder / "tasks" / task
        return self._figures(fitting, settings, shape, folder, given)

    def _figures(
        self,
        own: Sequence[DecodedSample],
        settings: SampleConfig,
        shape: ClipShape,
        folder: Path,
        own_given: Sequence[tuple[int, GivenOf]],
    ) -> dict[str, Any]:
        mesh = self.parts.mesh
        known = [(s.key.slot, s.caption, told(s)) for s in own]
        every = sorted(_gathered(mesh, known), key=lambda row: row[0])
        given = sorted(_gathered(mesh, own_given), key=lambda row: row[0])
        if not every:
            return {"num_samples": 0}
        captions = [caption for _, caption, _ in every]
        clips = self._clips(captions, settings, shape, [g for _, g in given])
        # What ten thousand samples are measured by is a few numbers each; their pixels stay where
        # they are, but for those that are shown, and those that are compared with the real ones.
        shown = _gathered(mesh, [clip for clip in clips if clip.index < NUM_SHOWN])
        shown.sort(key=lambda clip: clip.index)
        config = None if not settings.task else self.config.tasks[settings.task]
        edits = config is not None and any(
            config.stream(name, False).references == "clean" for name in config.wanting
        )
        in_part = [c for c in clips if edits or (c.given is not None and bool(c.given.any()))]
        compared = {clip.index: clip for clip in _gathered(mesh, in_part)}
        place = {slot: index for index, (slot, _, _) in enumerate(every)}
        if edits:
            own_before = [(place[s.key.slot], s.references) for s in own]
            before = dict(_gathered(mesh, [row for row in own_before if row[0] < NUM_SHOWN]))
            shown = [dataclasses.replace(clip, pictures=before[clip.index]) for clip in shown]
        mesh.from_main(lambda: save_gallery(folder, shown, settings))
        made, real = [], []
        for clip in clips:
            asked = every[clip.index][2]
            made.append(self._measured(clip.index, media_of(clip), clip.prompt, asked))
            self.progress("measuring clips", len(made), len(clips))
        rate_hz = self.config.data.audio_rate
        for sample in own:
            index = place[sample.key.slot]
            media = Media(sample.video, sample.fps, sample.audio, rate_hz)
            measured = self._measured(index, media, sample.caption, told(sample))
            measured = self._with_fill(measured, compared.get(index), sample)
            if edits:
                measured = _with_edit(measured, compared.get(index), sample)
            real.append(measured)
            self.progress("measuring the data", len(real), len(own))
        made, real = (sorted(_gathered(mesh, side), key=_place) for side in (made, real))
        generated = [
            name
            for name in (VIDEO, AUDIO)
            if config is None or config.stream(name, False).use == "target"
        ]
        figures = figures_of(made, real, generated) if mesh.is_main else {}
        return {"num_samples": len(every), **figures}

    def _clips(
        self,
        captions: Sequence[str],
        settings: SampleConfig,
        shape: ClipShape,
        given: Sequence[GivenOf],
    ) -> list[Clip]:
        config, parts = self.config, self.parts
        with using_ema(parts.emas, settings.ema):
            return parts.generator(master_dtype(config), self._drawn)(
                captions,
                shape,
                settings,
                sampling_shift(config, parts),
                [latents for latents, _ in given],
                [pictures for _, pictures in given],
            )

    def _drawn(self, done: int, total: int) -> None:
        self.progress("drawing", done, total)

    @cached_property
    def _extractors(self) -> dict[str, Extractor]:
        device = self.parts.mesh.device
        return {name: e.build(device) for name, e in self.config.eval.extractors.items()}

    def _measured(self, place: int, media: Media, caption: str, asked: Told) -> Measured:
        return measure(place, media, caption, asked, self._extractors)

    def _with_fill(self, measured: Measured, clip: Clip | None, sample: DecodedSample) -> Measured:
        """With how near the clip is to the real one, if it was given a part of it."""
        real = sample.video
        if clip is None or clip.given is None or clip.video is None or real is None:
            return measured
        if not clip.is_given_in_part or clip.given.shape != real.shape[:3]:
            return measured
        codec = self.encoder.encoders.video
        assert codec is not None
        coded = codec.decode(codec.encode(real.to(self.parts.mesh.device))).cpu()
        filled = compare_fill(clip.video, real, coded, clip.given)
        return dataclasses.replace(measured, filled=filled)


def _with_edit(measured: Measured, clip: Clip | None, sample: DecodedSample) -> Measured:
    """With how near to the sample the picture is that was drawn after its reference pictures."""
    real, references = sample.video, sample.references
    if clip is None or clip.video is None or real is None or references is None:
        return measured
    if clip.video.shape != real.shape:
        return measured  # a sample that keeps its own size
    return dataclasses.replace(measured, edited=compare_edit(clip.video, real, references))


def takes_captions_alone(task: TaskConfig) -> bool:
    """Whether a caption is enough to draw a clip of a task, and nothing but the clip is drawn."""
    return all(
        stream.use != "clean" and stream.given == "none" and stream.references == "absent"
        for name, stream in task.streams.items()
        if name in (VIDEO, IMAGE, AUDIO)
    )


def _is_still(sample: DecodedSample) -> bool:
    return sample.video is not None and len(sample.video) == 1


def media_of(clip: Clip) -> Media:
    """A generated clip as what is measured."""
    return Media(clip.video, clip.fps, clip.sound, clip.rate_hz)


def told(sample: DecodedSample) -> Told:
    """What a sample's record says that it shows; its sound, if the caption says so, too."""
    extra = sample.meta.extra
    sound = extra.get("sound", "")
    return Told(
        extra.get("sprite", ""),
        extra.get("direction", ""),
        extra.get("action", ""),
        sound if sound in sample.caption else "",
    )


def _gathered(mesh: Mesh, own: Sequence[Any]) -> list[Any]:
    """The items of all ranks; of those that share packs, one counts."""
    return [row for part in mesh.gather_objects(list(own) if mesh.counts else []) for row in part]


def _place(measured: Measured) -> int:
    return measured.place
