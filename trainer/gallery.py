"""Sampled clips and sounds as files: one folder per step, playable, with a contact sheet."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kinodit.data.encode import IMAGE, VIDEO
from kinodit.data.given import read_given, read_references
from kinodit.data.media import Pixels, contact_sheet, write_mp4, write_png
from kinodit.data.sound_file import spectrogram, write_sound
from kinodit.data.tasks import TaskConfig
from kinodit.trainer.config import RunConfig
from kinodit.trainer.generate import Clip, SampleConfig, using_ema
from kinodit.trainer.setup import Parts, clip_shape, sampling_shift

Entry = dict[str, object]
SPECTROGRAM_COLUMNS = 240
PICTURE_ROWS = 96
"""Of the spectrogram of a sound without pictures."""
SHEET_ROWS = 40
"""Of the spectrogram under the frames of a clip."""
NOT_GIVEN = 128
"""The grey of what a task gave nothing of."""
_log = logging.getLogger("kinodit")


def save_gallery(folder: Path, clips: Sequence[Clip], config: SampleConfig) -> list[Entry]:
    """Write clips, index.json and sheet.png; the index's entries.

    A clip is an mp4 with its sound, and a file of the sound alone (whole: mp4 has lossy sound); of
    one frame it is a PNG, without pictures the file of its sound and a PNG of its spectrogram. Of
    a clip that was given in part there is NNN.given.mp4 (or PNG), grey where it was not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_save_clip(folder, clip, config) for clip in clips]
    if clips:
        rows = [row for clip in clips for row in _sheet_rows(clip)]
        videos, captions, below = zip(*rows, strict=True)
        write_png(folder / "sheet.png", torch.tensor(contact_sheet(videos, captions, below=below)))
    (folder / "index.json").write_text(json.dumps(entries, indent=1))
    return entries


def _sheet_rows(clip: Clip) -> Iterator[tuple[Pixels | Tensor, str, Pixels | None]]:
    """(frames, caption, what is under them) of the rows of a contact sheet."""
    if clip.video is None:
        yield _spectrogram_video(clip), clip.prompt, None
        return
    if clip.is_given_in_part:
        yield _given_part(clip), f"{clip.prompt} – what was given", None
    yield _all_frames(clip), clip.prompt, _spectrogram(clip, SHEET_ROWS)


def _given_part(clip: Clip) -> Tensor:
    """The frames of a clip, grey where its task gave nothing: uint8 [T, H, W, 3]."""
    assert clip.video is not None and clip.given is not None
    return clip.video.where(clip.given.unsqueeze(-1), NOT_GIVEN)


def _all_frames(clip: Clip) -> Tensor:
    """The frames of a clip, after the pictures that were drawn with it: uint8 [T, H, W, 3]."""
    assert clip.video is not None
    return clip.video if clip.pictures is None else torch.cat([clip.pictures, clip.video])


def _save_clip(folder: Path, clip: Clip, config: SampleConfig) -> Entry:
    name = f"{clip.index:03d}"
    entry: Entry = {
        "prompt": clip.prompt,
        "file": "",
        "seed": clip.seed,
        "steps": config.sampler.steps,
        "guidance": config.guidance.scale,
    }
    if config.negative:
        entry["negative"] = config.negative
    if clip.task:
        entry["task"] = clip.task
    if clip.sound is not None:
        entry |= {"sound": f"{name}.{config.sound_format}", "rate_hz": clip.rate_hz}
        write_sound(folder / f"{name}.{config.sound_format}", clip.sound, clip.rate_hz)
    if clip.video is None:
        assert clip.sound is not None, "a clip has pictures, or sound"
        picture = _spectrogram_video(clip)[0]
        write_png(folder / f"{name}.png", picture)
        return entry | {"file": entry["sound"], "picture": f"{name}.png"}
    num_frames, height, width, _ = clip.video.shape
    entry["file"] = f"{name}.{'mp4' if num_frames > 1 else 'png'}"
    sound = None if clip.sound is None else (clip.sound, clip.rate_hz)
    _write(folder / str(entry["file"]), clip.video, clip.fps, sound)
    if clip.is_given_in_part:
        entry["given"] = f"{name}.given.{'mp4' if num_frames > 1 else 'png'}"
        _write(folder / str(entry["given"]), _given_part(clip), clip.fps)
    if clip.pictures is not None:
        entry["pictures"] = [f"{name}.ref{number}.png" for number in range(len(clip.pictures))]
        for number, picture in enumerate(clip.pictures):
            write_png(folder / f"{name}.ref{number}.png", picture)
    return entry | {
        "fps": clip.fps,
        "num_frames": num_frames,
        "height": height,
        "width": width,
    }


def _write(path: Path, video: Tensor, fps: float, sound: tuple[Tensor, int] | None = None) -> None:
    """A clip as mp4, one frame as PNG."""
    if len(video) > 1:
        write_mp4(path, video, fps, sound)
    else:
        write_png(path, video[0])


def _spectrogram(clip: Clip, height: int) -> Pixels | None:
    if clip.sound is None:
        return None
    return spectrogram(clip.sound, clip.rate_hz, SPECTROGRAM_COLUMNS, height)


def _spectrogram_video(clip: Clip) -> Pixels:
    """The sound as a picture, of the size of a strip: uint8 [1, H, W, 3]."""
    picture = _spectrogram(clip, PICTURE_ROWS)
    assert picture is not None
    return picture[None]


@dataclass
class Gallery:
    """Draws prompts, shared out over the ranks, and writes them on rank 0.

    progress: as of `kinodit.trainer.generate.Generator`
    """

    config: RunConfig
    parts: Parts
    dtype: torch.dtype
    progress: Callable[[int, int], None] = lambda done, total: None

    def __call__(self, folder: Path, prompts: Sequence[str], settings: SampleConfig) -> list[Entry]:
        """The entries of the written folder on rank 0, none elsewhere. Collective."""
        parts = self.parts
        generator = parts.generator(self.dtype, self.progress)
        shape, shift = clip_shape(self.config), sampling_shift(self.config, parts)
        given: list[Mapping[str, Tensor]] = []
        if settings.given:
            (sample,) = parts.encoder.encode([read_given(Path(settings.given), self.config.data)])
            given = [sample.latents]
        pictures = self._references(settings)
        with using_ema(parts.emas, settings.ema):
            clips = generator(
                prompts, shape, settings, shift, given, [pictures] if pictures else []
            )
        gathered = parts.mesh.gather_objects(clips if parts.mesh.counts else [])
        if not parts.mesh.is_main:
            return []
        everything = sorted((c for part in gathered for c in part), key=lambda clip: clip.index)
        return save_gallery(folder, everything, settings)

    def _references(self, settings: SampleConfig) -> list[Tensor]:
        """Latents of the pictures that the settings name, or zeros for those that are drawn."""
        data, codec = self.config.data, self.parts.encoder.encoders.video
        task = self.config.tasks.get(settings.task, TaskConfig())
        if settings.references:
            files = [Path(file) for file in settings.references]
            return self.parts.encoder.pictures(read_references(files, data))
        wanted = {task.stream(name, False).references for name in (VIDEO, IMAGE)}
        if "target" not in wanted:
            return []
        assert codec is not None
        grid = codec.latent_shape(1, data.height, data.width)
        return [torch.zeros(codec.latent_channels, *grid)] * data.max_references

    def at_step(self, step: int) -> list[Entry]:
        """The recipe's prompts, written to RUN/samples/step-N; none on a full disk. Collective."""
        folder = self.config.run.folder / "samples" / f"step-{step:08d}"
        try:
            return self(folder, self.config.sample.prompts, self.config.sample)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # It costs these clips, not the run; the other ranks have done their part.
            shutil.rmtree(folder, ignore_errors=True)
            _log.warning("disk full: no samples of step %d", step)
            return []
