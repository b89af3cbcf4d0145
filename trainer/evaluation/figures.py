"""From what was measured of each clip to figures: distances, scores, and whether clips obey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from kinodit.models.encoders.features import Extractor
from kinodit.trainer.evaluation import embedded
from kinodit.trainer.evaluation.change import Changes, compare_changes
from kinodit.trainer.evaluation.distance import Features, frechet, kernel_distance
from kinodit.trainer.evaluation.edit import Edited, edit_figures
from kinodit.trainer.evaluation.fill import Filled, fill_figures
from kinodit.trainer.evaluation.synchrony import Events, compare_events, events_of
from kinodit.trainer.evaluation.truth import Seen, Told, compare, see

EMBEDDED = "embedded"
"""The name of the features that need no weights."""
DISTANCES = {
    "picture": {"fid": frechet, "kid": kernel_distance},
    "video": {"fvd": frechet},
    "sound": {"fad": frechet},
}
"""What is computed of features of each kind."""
STREAM_OF = {"picture": "video", "video": "video", "sound": "audio"}
"""Whose features these are."""
TRUTH_OF = {"object": "video", "direction": "video", "colour_error": "video", "sound": "audio"}
"""Whose what is found is: of a stream that is given it is known, and says nothing."""
EVERYTHING = "everything_named"
LAGS = ("lag_frames", "within_a_frame")
"""Figures of how far sounds are from what is seen."""
BOUNCE = "bounce"
"""The action of clips whose bounces and clicks are looked for."""


@dataclass(frozen=True)
class Media:
    """A clip, real or generated: uint8 [T, H, W, 3] at `fps`, float32 [A, N] at `rate_hz`."""

    video: Tensor | None
    fps: float
    sound: Tensor | None
    rate_hz: int


@dataclass(frozen=True)
class Measured:
    """What is kept of one clip.

    place:    its place among its like
    features: (kind, extractor) -> [D]
    scores:   extractor -> agreement of picture and caption
    changes:  extractor -> when its picture and its sound change
    events:   bounces and clicks, of clips that were to have them
    filled:   of a real clip: how near the one is that was given a part of it
    edited:   of a real sample: how near what was drawn after its reference pictures is
    """

    place: int
    features: Mapping[tuple[str, str], Features]
    scores: Mapping[str, float]
    changes: Mapping[str, Changes]
    told: Told = field(default_factory=Told)
    seen: Seen | None = None
    events: Events | None = None
    filled: Filled | None = None
    edited: Edited | None = None


def measure(
    place: int, media: Media, caption: str, told: Told, extractors: Mapping[str, Extractor]
) -> Measured:
    """Features and scores of one clip, by the embedded and the given extractors."""
    features: dict[tuple[str, str], Features] = {}
    scores: dict[str, float] = {}
    changes: dict[str, Changes] = {}
    video, sound = media.video, media.sound
    moves = video is not None and len(video) > 1
    if video is not None:
        features["picture", EMBEDDED] = embedded.picture_features(video)
        if moves:
            features["video", EMBEDDED] = embedded.video_features(video)
    if sound is not None:
        features["sound", EMBEDDED] = embedded.sound_features(sound, media.rate_hz)
    for name, extractor in extractors.items():
        kind = extractor.config.kind
        if kind == "sound":
            if sound is not None:
                features[kind, name] = extractor.of_sound(sound, media.rate_hz).numpy()
        elif kind == "synchrony":
            if video is not None and moves and sound is not None:
                curves = extractor.changes(video, media.fps, sound, media.rate_hz)
                changes[name] = Changes(*(curve.numpy() for curve in curves))
        elif video is not None and kind == "clip_score":
            scores[name] = extractor.agreement(video, caption)
        elif video is not None and (moves or kind == "picture"):
            features[kind, name] = extractor.of_video(video).numpy()
    seen = events = None
    if video is not None and moves:
        heard = None if sound is None else sound.numpy()
        if told.action != BOUNCE:
            seen = see(video.numpy(), media.fps, heard, media.rate_hz)
        elif heard is not None:
            events = events_of(video.numpy(), media.fps, heard, media.rate_hz)
    return Measured(place, features, scores, changes, told, seen, events)


def figures_of(
    made: Sequence[Measured], real: Sequence[Measured], generated: Sequence[str]
) -> dict[str, Any]:
    """Distances, scores, synchrony and truth of generated clips against real ones.

    Beside each distance stands that of one half of the real clips to the other ("..._of_halves"):
    how far apart two samples of one law are, at half the size. Streams that are not `generated` are
    the real ones: they have no distance.
    """
    figures: dict[str, Any] = {}
    for kind, extractor in sorted({key for one in real for key in one.features}):
        if STREAM_OF[kind] not in generated:
            continue
        ours, theirs = (
            np.array([m.features[kind, extractor] for m in side if (kind, extractor) in m.features])
            for side in (made, real)
        )
        if len(ours) < 2 or len(theirs) < 2:
            continue
        for name, distance in DISTANCES[kind].items():
            figures.setdefault(name, {})[extractor] = distance(ours, theirs)
            if len(theirs) >= 4:
                halves = distance(theirs[::2], theirs[1::2])
                figures.setdefault(f"{name}_of_halves", {})[extractor] = halves
    for label, side in (("clip_score", made), ("clip_score_real", real)):
        for name in sorted({name for one in side for name in one.scores}):
            scores = [m.scores[name] for m in side if name in m.scores]
            figures.setdefault(label, {})[name] = float(np.mean(scores))
    for name in sorted({name for one in made for name in one.changes}):
        found, of_data = (
            compare_changes([m.changes[name] for m in side if name in m.changes])
            for side in (made, real)
        )
        of_data = {f"{key}_real": of_data[key] for key in LAGS if key in of_data}
        figures.setdefault("av_synchrony", {})[name] = {**found, **of_data}
    shown = [(m.told, m.seen) for m in made if m.seen is not None]
    known = [(m.told, m.seen) for m in real if m.seen is not None]
    if shown and known:
        truth = compare([t for t, _ in shown], [s for _, s in shown], known)
        truth = of_generated(truth, generated)
        if truth:
            figures["truth"] = truth
    bounces = compare_events([m.events for m in made if m.events is not None])
    if bounces:
        of_data = compare_events([m.events for m in real if m.events is not None])
        of_data = {f"{name}_real": of_data[name] for name in LAGS}
        figures["synchrony"] = {**bounces, **of_data}
    fill = fill_figures([m.filled for m in real if m.filled is not None])
    if fill:
        figures["fill"] = fill
    edit = edit_figures([m.edited for m in real if m.edited is not None])
    if edit:
        figures["edit"] = edit
    return figures


def of_generated(truth: Mapping[str, Any], generated: Sequence[str]) -> dict[str, Any]:
    """What was found of streams that were generated, and of both together if both were."""
    known = [name for name, stream in TRUTH_OF.items() if stream not in generated]
    if any(name in truth for name in known):
        known.append(EVERYTHING)
    return {key: value for key, value in truth.items() if not key.startswith(tuple(known))}
