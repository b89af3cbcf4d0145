"""One self-contained HTML contact sheet of a dataset: `kinodit data preview`."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
from numpy.typing import NDArray

from kinodit.data.checksums import Bytes
from kinodit.data.config import DecodeConfig
from kinodit.data.decode import DecodeError
from kinodit.data.manifest import Dataset
from kinodit.data.picture import CENTRE
from kinodit.data.preview_page import PAGE
from kinodit.data.probe import MediumError, with_facts
from kinodit.data.probe_worker import ProbeWorker
from kinodit.data.reader import ShardError, ShardReader
from kinodit.data.record import Caption, Modality, Record, RecordMeta
from kinodit.data.stats import collect
from kinodit.data.worker import DecodeWorker
from kinodit.models.errors import MissingExtraError, UserError
from kinodit.models.random import generator

STRIP_FRAMES = 6
STRIP_HEIGHT = 96
MAX_SHOWN_S = 60.0
"""Of a longer clip the first minute is shown."""
MAX_EMBEDDED_BYTES = 400_000
"""A larger medium is shown but cannot be played from the page."""
_WAVE_COLUMNS = 240
_AUDIO_RATE = 16_000

SILENT_PEAK, CLIPPED_PEAK = 1e-3, 0.999
DARK_LEVEL, BRIGHT_LEVEL, STILL_LEVEL = 16.0, 245.0, 0.5
_MIME = {
    "mp4": "video/mp4", "webm": "video/webm", "jpg": "image/jpeg",
    "jpeg": "image/jpeg", "png": "image/png",
    "webp": "image/webp", "flac": "audio/flac", "wav": "audio/wav", "opus": "audio/ogg",
}  # fmt: skip


class PreviewError(UserError):
    """A preview that cannot be made or written."""


@dataclass
class Card:
    """One sample of the page. `strip` and `medium` are data URIs, `wave` is an SVG path."""

    key: str
    modality: Modality
    captions: tuple[Caption, ...]
    facts: str
    details: list[tuple[str, str]]
    flags: list[str] = field(default_factory=list)
    strip: str = ""
    wave: str = ""
    medium: str = ""
    problem: str = ""
    wave_width: int = _WAVE_COLUMNS


@dataclass(frozen=True)
class _Openers:
    """Processes that open media: one that hangs or crashes is shown as a damaged medium."""

    probes: ProbeWorker
    decodes: DecodeWorker


def preview(
    dataset: Dataset,
    out: Path,
    num_samples: int = 60,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes the page; how many samples it shows.

    Samples are drawn without replacement and shown in the dataset's order. One that cannot be read
    or decoded is shown with the reason. `progress` is called with (samples done, samples of the
    page). Raises PreviewError for a bad number or place.
    """
    if num_samples < 1:
        raise PreviewError(f"num-samples is {num_samples}; it must be at least 1")
    count = min(num_samples, len(dataset))
    chosen = generator(seed, "preview").choice(len(dataset), size=count, replace=False)
    reader = ShardReader(dataset)
    cards = []
    with closing(ProbeWorker()) as probes, closing(DecodeWorker()) as decodes:
        openers = _Openers(probes, decodes)
        for index in np.sort(chosen).tolist():
            cards.append(_card(reader, index, openers))
            progress(len(cards), count)
    stats = collect(dataset)
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    text = page.render(
        stats=stats,
        histograms=[
            ("Resolution (pixels)", stats.resolutions),
            ("Duration (seconds)", stats.durations),
            ("First caption (characters)", stats.caption_chars),
        ],
        cards=cards,
        strip_frames=STRIP_FRAMES,
        modalities=sorted({card.modality for card in cards}),
        flags=sorted({flag for card in cards for flag in card.flags}),
    )
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PreviewError(f"{out} cannot be written: {error.strerror or error}") from error
    return count


def _card(reader: ShardReader, index: int, openers: _Openers) -> Card:
    try:
        record = reader.read(index)
    except ShardError as error:
        modality = reader.dataset.row(index).modality_name
        return Card(f"sample {index}", modality, (), "", [], ["unreadable"], problem=str(error))
    meta, problem = record.meta, ""
    if not meta.is_probed and record.medium is not None:
        try:
            meta = with_facts(meta, openers.probes.probe(*record.medium))
        except MediumError as error:
            problem = str(error)
    card = Card(
        record.key,
        meta.modality,
        meta.captions,
        _facts(meta),
        _details(record, meta),
        problem=problem,
    )
    card.problem = problem
    if not any(caption.text for caption in meta.captions):
        card.flags.append("no caption")
    if record.medium is None:
        card.flags.append("no medium")
        return card
    name, data = record.medium
    if len(data) <= MAX_EMBEDDED_BYTES:
        card.medium = _data_uri(_MIME[name], data)
    try:
        _draw(card, record, meta, openers.decodes)
    except (DecodeError, MediumError) as error:
        card.flags.append("does not decode")
        card.problem = str(error)
    return card


def _draw(card: Card, record: Record, meta: RecordMeta, worker: DecodeWorker) -> None:
    """Adds frames and waveform to a card, and what is odd about them."""
    shown_s = min(meta.duration_s, MAX_SHOWN_S) or 1.0
    width = round(STRIP_HEIGHT * meta.width / meta.height) if meta.height else STRIP_HEIGHT
    config = DecodeConfig(
        height=STRIP_HEIGHT,
        width=max(2, width),
        num_frames=STRIP_FRAMES,
        fps=STRIP_FRAMES / shown_s,
        window="first",
        use_audio=meta.has_audio,
        audio_rate=_AUDIO_RATE,
        max_duration_s=float("3e7"),
        max_references=len(record.references),
    )
    media = worker.decode(record, config, 0.0, CENTRE)
    if media.video is not None:
        frames = media.video.numpy()
        before = [] if media.references is None else [media.references.numpy()]
        card.strip = _strip(np.concatenate([*before, frames]))
        card.flags += _picture_flags(frames, is_video=meta.modality == "video")
    if media.audio is not None and meta.has_audio:
        sound = media.audio.numpy()
        peak = float(np.abs(sound).max(initial=0))
        if peak < SILENT_PEAK:
            card.flags.append("silent")
        elif peak > CLIPPED_PEAK:
            card.flags.append("clipped sound")
        card.wave = _wave(sound)


def _picture_flags(frames: NDArray[np.uint8], *, is_video: bool) -> list[str]:
    pixels = frames.astype(np.float32)
    level = float(pixels.mean())
    flags = []
    if level < DARK_LEVEL:
        flags.append("dark")
    if level > BRIGHT_LEVEL:
        flags.append("blown out")
    if is_video and float(np.abs(np.diff(pixels, axis=0)).mean()) < STILL_LEVEL:
        flags.append("no motion")
    return flags


def _strip(frames: NDArray[np.uint8]) -> str:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("Pillow", "media", "drawing a preview") from error
    target = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(target, "JPEG", quality=85)
    return _data_uri("image/jpeg", target.getvalue())


def _wave(sound: NDArray[np.float32]) -> str:
    """SVG path of the envelope of a sound [channels, samples], y from -1 to 1."""
    mono = sound.mean(axis=0)
    columns = np.array_split(mono, min(_WAVE_COLUMNS, max(1, len(mono))))
    bars = (
        f"M{x} {-float(piece.max(initial=0)) - 0.01:.3f}h.8"
        f"V{-float(piece.min(initial=0)) + 0.01:.3f}h-.8z"
        for x, piece in enumerate(columns)
    )
    return "".join(bars)


def _facts(meta: RecordMeta) -> str:
    parts: list[str] = [meta.modality]
    if meta.width:
        parts.append(f"{meta.width}×{meta.height}")
    if meta.modality == "video":
        parts.append(f"{meta.num_frames} frames, {round(meta.fps, 2):g}/s")
    if meta.duration_s:
        parts.append(f"{meta.duration_s:.2f} s")
    if meta.has_audio:
        parts.append(f"sound {meta.sample_rate / 1000:g} kHz")
    return " · ".join(parts)


def _details(record: Record, meta: RecordMeta) -> list[tuple[str, str]]:
    sizes = ", ".join(f"{name} ({len(data):,} bytes)" for name, data in record.members.items())
    found = [
        ("id", meta.id),
        ("members", sizes),
        ("source", meta.source),
        ("licence", meta.licence),
    ]
    found += [(f"reference {number}", text) for number, text in enumerate(meta.references, 1)]
    found += [(name, f"{value:g}") for name, value in meta.scores.items()]
    found += list(meta.extra.items())
    return [(name, value) for name, value in found if value]


def _data_uri(mime: str, data: Bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
