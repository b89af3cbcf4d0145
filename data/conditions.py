"""What a recipe and its filters ask of samples, evaluated on pieces of an index."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kinodit.data.config import DataConfig, DecodeConfig, RangeConfig, WhereConfig
from kinodit.data.manifest import Dataset, Piece
from kinodit.data.reader import ShardReader
from kinodit.data.record import MODALITIES, RecordMeta
from kinodit.data.row_facts import FLAG_AUDIO
from kinodit.data.spec import CostModel
from kinodit.data.window import FPS_SCALE, num_window_starts

Mask = NDArray[np.bool_]


def tokens_of(piece: Piece, config: DataConfig, cost: CostModel) -> NDArray[np.int64]:
    """[len] the tokens of each sample at most."""
    picture = {"video": cost.video_tokens, "image": cost.image_tokens or 0, "audio": 0}
    sound = cost.audio_tokens if config.use_audio else 0
    by_modality = np.array([picture[name] for name in MODALITIES], dtype=np.int64)
    modality = piece.column("modality")
    has_audio = (piece.column("flags") & FLAG_AUDIO).astype(np.bool_)
    has_audio |= modality == MODALITIES.index("audio")
    tokens: NDArray[np.int64] = by_modality[modality] + cost.text_tokens
    return tokens + has_audio * sound


def usable(piece: Piece, config: DecodeConfig, fits: Mask | None) -> list[tuple[str, Mask]]:
    """What the recipe needs of a sample, whatever its filters, with the mask [len] of each.

    A zero in the index means "not known": such samples pass, and are checked when decoded. `fits`:
    which samples have a size of their own; None: they take the recipe's.
    """
    conditions: list[tuple[str, Mask]] = []
    modality = piece.column("modality")
    if not config.use_audio:
        text = "has a picture (data.use_audio is false)"
        conditions.append((text, modality != MODALITIES.index("audio")))
    if not config.use_video:
        has_audio = (piece.column("flags") & FLAG_AUDIO).astype(np.bool_)
        text = "has sound (data.use_video is false)"
        conditions.append((text, has_audio | (modality == MODALITIES.index("audio"))))
    pixels = piece.column("height").astype(np.int64) * piece.column("width")
    small = (pixels <= config.max_pixels) & (
        piece.column("duration_ms") <= config.max_duration_s * 1000
    )
    within = f"at most {config.max_pixels} pixels and {config.max_duration_s:g} s", small
    if fits is not None:
        return [
            *conditions,
            (f"has a length that the codec takes at {config.fps:g} fps", fits),
            within,
        ]
    # Few pairs of length and rate occur, so each is worked out once, exactly.
    pairs = piece.column("num_frames").astype(np.int64) << 32 | piece.column("fps_milli")
    different, inverse = np.unique(pairs, return_inverse=True)
    fits = np.array(
        [
            0 in (count, rate) or num_window_starts(count, rate, config) > 0
            for count, rate in (divmod(pair, 1 << 32) for pair in different.tolist())
        ],
        dtype=np.bool_,
    )
    is_video = modality == MODALITIES.index("video")
    text = f"a video has {config.num_frames} frames at {config.fps:g} fps"
    conditions.append((text, ~is_video | fits[inverse]))
    return [*conditions, within]


def by_row(piece: Piece, where: WhereConfig) -> list[tuple[str, Mask]]:
    """Conditions on the index, with the mask [len] of each."""
    conditions: list[tuple[str, Mask]] = []
    if where.modality is not None:
        mask = piece.column("modality") == MODALITIES.index(where.modality)
        conditions.append((f"modality is {where.modality}", mask))
    if where.has_audio is not None:
        has_audio = (piece.column("flags") & FLAG_AUDIO).astype(np.bool_)
        text = "has audio" if where.has_audio else "has no audio"
        conditions.append((text, has_audio == where.has_audio))
    ranges = {
        "num_frames": (where.num_frames, piece.column("num_frames")),
        "duration_s": (where.duration_s, piece.column("duration_ms") / 1000),
        "fps": (where.fps, piece.column("fps_milli") / FPS_SCALE),
        "height": (where.height, piece.column("height")),
        "width": (where.width, piece.column("width")),
    }
    for name, (bounds, values) in ranges.items():
        if bounds == RangeConfig():
            continue
        low = -np.inf if bounds.min is None else bounds.min
        high = np.inf if bounds.max is None else bounds.max
        conditions.append((_range_text(name, bounds), (values >= low) & (values <= high)))
    return conditions


def by_meta(
    dataset: Dataset, piece: Piece, where: WhereConfig, indices: NDArray[np.int64]
) -> list[tuple[str, Mask]]:
    """Conditions on the records at `indices` of `piece`, with the mask [len] of each; one pass."""
    tests: list[tuple[str, Callable[[RecordMeta], bool]]] = []
    for name, value in where.extra.items():
        tests.append((f"extra.{name} is {value!r}", partial(_has_extra, name, value)))
    for name, bounds in where.scores.items():
        tests.append((_range_text(f"scores.{name}", bounds), partial(_has_score, name, bounds)))
    if not tests:
        return []
    masks = np.zeros((len(tests), len(piece)), dtype=np.bool_)
    reader = ShardReader(dataset)
    for index in indices.tolist():
        meta = reader.read(piece.first + index).meta
        masks[:, index] = [test(meta) for _, test in tests]
    reader.close()
    return [(text, mask) for (text, _), mask in zip(tests, masks, strict=True)]


def _has_extra(name: str, value: str, meta: RecordMeta) -> bool:
    return meta.extra.get(name) == value


def _has_score(name: str, bounds: RangeConfig, meta: RecordMeta) -> bool:
    if name not in meta.scores:
        return False
    above = bounds.min is None or meta.scores[name] >= bounds.min
    return above and (bounds.max is None or meta.scores[name] <= bounds.max)


def _range_text(name: str, bounds: RangeConfig) -> str:
    parts = [] if bounds.min is None else [f"{name} >= {bounds.min:g}"]
    if bounds.max is not None:
        parts.append(f"{name} <= {bounds.max:g}")
    return " and ".join(parts) or f"has {name}"
