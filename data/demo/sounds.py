"""Synthesised sounds with a name and a known start.

Arrays are float32 [samples] at `SAMPLE_RATE`, mono, within -1 to 1; times are in seconds. Before
its onset a sound is silence, and its first millisecond is already loud: the onset can be heard,
and measured, to a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kinodit.data.demo.mux import SAMPLE_RATE

Sound = NDArray[np.float32]
_PEAK = 0.5
_ATTACK_S, _RELEASE_S = 0.004, 0.08


def place(sound: Sound, onset_s: float, duration_s: float) -> Sound:
    """`sound` from `onset_s` on, in silence of `duration_s`."""
    out = np.zeros(round(duration_s * SAMPLE_RATE), np.float32)
    start = round(onset_s * SAMPLE_RATE)
    piece = sound[: len(out) - start]
    out[start : start + len(piece)] = piece
    return out


def _times(duration_s: float) -> NDArray[np.float64]:
    return np.arange(round(duration_s * SAMPLE_RATE)) / SAMPLE_RATE


def _shaped(wave: NDArray[np.float64]) -> Sound:
    """Scaled to the peak all sounds share, with a short attack and release."""
    t = _times(len(wave) / SAMPLE_RATE)
    envelope = np.minimum(1, t / _ATTACK_S) * np.minimum(1, (t[-1] - t) / _RELEASE_S)
    return np.asarray(wave / np.abs(wave).max() * envelope * _PEAK, dtype=np.float32)


def _glide(duration_s: float, start_hz: float, end_hz: float) -> Sound:
    """A tone with two overtones whose pitch moves evenly on a musical scale."""
    t = _times(duration_s)
    pitch = start_hz * (end_hz / start_hz) ** (t / duration_s)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    return _shaped(np.sin(phase) + 0.4 * np.sin(2 * phase) + 0.2 * np.sin(3 * phase))


def steady_tone(duration_s: float, pitch_hz: float, _: np.random.Generator) -> Sound:
    """A tone of one pitch."""
    return _glide(duration_s, pitch_hz, pitch_hz)


def rising_tone(duration_s: float, pitch_hz: float, _: np.random.Generator) -> Sound:
    """A tone that rises by an octave."""
    return _glide(duration_s, pitch_hz, 2 * pitch_hz)


def falling_tone(duration_s: float, pitch_hz: float, _: np.random.Generator) -> Sound:
    """A tone that falls by an octave."""
    return _glide(duration_s, 2 * pitch_hz, pitch_hz)


def warble(duration_s: float, pitch_hz: float, _: np.random.Generator) -> Sound:
    """A tone whose pitch swings six times a second."""
    t = _times(duration_s)
    pitch = pitch_hz * (1 + 0.12 * np.sin(2 * np.pi * 6 * t))
    return _shaped(np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE))


def whoosh(duration_s: float, pitch_hz: float, draw: np.random.Generator) -> Sound:
    """Noise around one pitch: air that rushes by."""
    spectrum = np.fft.rfft(draw.standard_normal(round(duration_s * SAMPLE_RATE)))
    hz = np.fft.rfftfreq(round(duration_s * SAMPLE_RATE), 1 / SAMPLE_RATE)
    band = np.exp(-0.5 * (np.log2(np.maximum(hz, 1) / pitch_hz) / 0.5) ** 2)
    return _shaped(np.fft.irfft(spectrum * band, round(duration_s * SAMPLE_RATE)))


def bell(duration_s: float, pitch_hz: float, _: np.random.Generator) -> Sound:
    """A struck bell: partials that are not in tune and die away."""
    t = _times(duration_s)
    partials = ((1.0, 1.0, 3), (2.76, 0.6, 5), (5.4, 0.3, 8))
    return _shaped(
        sum(
            (a * np.sin(2 * np.pi * pitch_hz * n * t) * np.exp(-decay * t))
            for n, a, decay in partials
        )
        + np.zeros_like(t)
    )


def beeps(duration_s: float, pitch_hz: float, _: np.random.Generator) -> Sound:
    """A tone that is on and off five times a second, on first."""
    t = _times(duration_s)
    return _shaped(np.sin(2 * np.pi * pitch_hz * t) * ((t * 5) % 1 < 0.5))


SOUNDS: dict[str, Callable[[float, float, np.random.Generator], Sound]] = {
    "steady tone": steady_tone,
    "rising tone": rising_tone,
    "falling tone": falling_tone,
    "warble": warble,
    "whoosh": whoosh,
    "bell": bell,
    "row of beeps": beeps,
}
"""name -> function of (duration in seconds, pitch in Hz, generator of its noise)."""

PITCHES: dict[str, float] = {"low": 220.0, "middle": 440.0, "high": 880.0}


def onset_s(sound: Sound, share: float = 0.1) -> float:
    """When a sound first exceeds `share` of its peak, in seconds. For measuring."""
    loud = np.abs(sound) > share * np.abs(sound).max()
    return float(np.argmax(loud)) / SAMPLE_RATE
