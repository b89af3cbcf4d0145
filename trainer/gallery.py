"""Sampled clips as files: one folder per step, playable, with a contact sheet."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kinodit.data.media import contact_sheet, write_mp4, write_png
from kinodit.trainer.config import RunConfig
from kinodit.trainer.generate import Clip, SampleConfig, using_ema
from kinodit.trainer.setup import Parts, clip_shape, sampling_shift

Entry = dict[str, object]
_log = logging.getLogger("kinodit")


def save_gallery(folder: Path, clips: Sequence[Clip], config: SampleConfig) -> list[Entry]:
    """Write clips (mp4; PNG for one frame), index.json and sheet.png; the index's entries."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    for clip in clips:
        num_frames, height, width, _ = clip.video.shape
        name = f"{clip.index:03d}.{'mp4' if num_frames > 1 else 'png'}"
        if num_frames > 1:
            write_mp4(folder / name, clip.video, clip.fps)
        else:
            write_png(folder / name, clip.video[0])
        entries.append(
            {
                "prompt": clip.prompt,
                "file": name,
                "seed": clip.seed,
                "steps": config.sampler.steps,
                "guidance": config.guidance.scale,
                "fps": clip.fps,
                "num_frames": num_frames,
                "height": height,
                "width": width,
            }
        )
    if clips:
        captions = [clip.prompt for clip in clips]
        write_png(
            folder / "sheet.png", torch.tensor(contact_sheet([c.video for c in clips], captions))
        )
    (folder / "index.json").write_text(json.dumps(entries, indent=1))
    return entries


@dataclass
class Gallery:
    """Draws prompts, shared out over the ranks, and writes them on rank 0."""

    config: RunConfig
    parts: Parts
    dtype: torch.dtype

    def __call__(self, folder: Path, prompts: Sequence[str], settings: SampleConfig) -> list[Entry]:
        """The entries of the written folder on rank 0, none elsewhere. Collective."""
        parts = self.parts
        generator = parts.generator(self.dtype)
        with using_ema(parts.emas, settings.ema):
            clips = generator(
                prompts, clip_shape(self.config), settings, sampling_shift(self.config, parts)
            )
        gathered = parts.mesh.gather_objects(clips if parts.mesh.counts else [])
        if not parts.mesh.is_main:
            return []
        everything = sorted((c for part in gathered for c in part), key=lambda clip: clip.index)
        return save_gallery(folder, everything, settings)

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
