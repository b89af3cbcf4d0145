"""A file that a sample is made from: a picture, a clip or a sound, as training would see it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kinodit.data.config import DecodeConfig
from kinodit.data.container import DecodeError
from kinodit.data.decode import DecodedSample
from kinodit.data.picture import CENTRE
from kinodit.data.plan import SampleRef
from kinodit.data.probe import MediumError, modality_of, with_facts
from kinodit.data.probe_worker import ProbeWorker
from kinodit.data.record import Record, RecordMeta
from kinodit.data.source import MEMBER_OF_SUFFIX, REMUXED
from kinodit.data.worker import DecodeWorker
from kinodit.models.errors import UserError
from kinodit.models.tokens import SampleKey


class GivenError(UserError):
    """A file that cannot be read as what a task is given."""


def read_references(paths: Sequence[Path], config: DecodeConfig) -> Tensor:
    """[R, H, W, 3] uint8: pictures that a clip is drawn after, of its size; of clips the first.

    Raises:
        GivenError: one cannot be read, is a sound, or there are more than `config.max_references`.
    """
    if len(paths) > config.max_references:
        raise GivenError(
            f"{len(paths)} reference pictures are given, but the run was trained with up to "
            f"{config.max_references} (data.max_references): leave some out"
        )
    pictures = []
    for path in paths:
        video = read_given(path, replace(config, num_frames=1, use_audio=False)).video
        if video is None:
            raise GivenError(f"{path}: a reference is a picture; it has none")
        pictures.append(video[:1])
    return torch.cat(pictures)


def read_given(path: Path, config: DecodeConfig) -> DecodedSample:
    """The first window of a medium, cropped in the middle; a picture is held for the whole clip.

    It is opened in processes that are killed where it hangs them.

    Raises:
        GivenError: it cannot be read, or is shorter than a clip of `config`.
    """
    suffix = path.suffix.lower()
    if suffix not in MEMBER_OF_SUFFIX:
        raise GivenError(
            f"{path}: {suffix or 'a file without a suffix'} is not known; known are "
            f"{', '.join(MEMBER_OF_SUFFIX)}"
        )
    try:
        data = path.read_bytes()
        extension = MEMBER_OF_SUFFIX[suffix]
        meta = RecordMeta(id=path.name, modality=modality_of(extension), captions=())
        with closing(ProbeWorker()) as opener, closing(DecodeWorker()) as decoder:
            data = opener.remux(data, REMUXED[suffix]) if suffix in REMUXED else data
            meta = with_facts(meta, opener.probe(extension, data))
            record = Record("given", meta, {extension: data})
            media = decoder.decode(record, replace(config, window="first"), 0.0, CENTRE)
    except OSError as error:
        raise GivenError(f"cannot read {path}: {error.strerror}") from error
    except (MediumError, DecodeError) as error:
        raise GivenError(f"{path}: {error}") from error
    video = media.video
    if video is not None and len(video) == 1:
        video = video.expand(config.num_frames, -1, -1, -1)
    return DecodedSample(
        key=SampleKey(0, 0, "given"),
        ref=SampleRef(0, str(path), 0, 0),
        caption="",
        video=video,
        audio=media.audio,
        fps=media.fps,
        start_s=media.start_s,
        view=media.view,
        meta=meta,
    )
