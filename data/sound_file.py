"""Sound as files that any player reads, and as pictures that show when and how high it is.

Shape legend: A channels (1 or 2), N samples; sound is float32 in [-1, 1].
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kinodit.data.media import Pixels, Sound, published, require_av, sound_frames
from kinodit.models.encoders.base import SoundFormat
from kinodit.models.encoders.mel import MelConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

FLOOR_DB = -70.0
"""What is quieter is black in a spectrogram."""
BLOCK = 4096
"""Samples of a block of FLAC."""
MAX_BANDS = 40
INK: Sequence[tuple[int, int, int]] = (
    (12, 12, 30),
    (62, 26, 102),
    (150, 44, 96),
    (226, 98, 60),
    (252, 182, 72),
    (252, 248, 220),
)
"""Colours of a spectrogram from silence to full scale: as bright as the sound is loud."""


def pcm16(sound: Sound | Tensor) -> npt.NDArray[np.int16]:
    """[A, N] as whole numbers of 16 bits; full scale is 32767, and what is beyond it is cut."""
    samples = np.asarray(sound, dtype=np.float32)
    assert samples.ndim == 2 and samples.shape[0] in (1, 2), samples.shape
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2")


def write_sound(path: Path, sound: Sound | Tensor, rate_hz: int) -> None:
    """Write [A, N] as 16-bit WAV or FLAC, by the path's ending; the same sound, the same bytes.

    Raises:
        MissingExtraError: PyAV, which FLAC needs, is not installed.
        OSError: the file cannot be written.
    """
    samples = pcm16(sound)
    with published(path) as temporary:
        if path.suffix == ".flac":
            _write_flac(temporary, samples, rate_hz)
            return
        assert path.suffix == ".wav", path
        with wave.open(str(temporary), "wb") as file:
            file.setnchannels(samples.shape[0])
            file.setsampwidth(2)
            file.setframerate(rate_hz)
            file.writeframes(np.ascontiguousarray(samples.T).tobytes())


def read_sound(path: Path) -> tuple[Sound, int]:
    """(float32 [A, N], rate in Hz) of a file that `write_sound` wrote.

    Raises:
        MissingExtraError: PyAV, which FLAC needs, is not installed.
    """
    if path.suffix == ".wav":
        with wave.open(str(path), "rb") as file:
            raw = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
            samples, rate_hz = raw.reshape(-1, file.getnchannels()).T, file.getframerate()
    else:
        av = require_av("reading FLAC")
        with av.open(str(path), format="flac") as container:
            stream = container.streams.audio[0]
            blocks = [frame.to_ndarray() for frame in container.decode(stream)]
            num_channels, rate_hz = stream.codec_context.channels, stream.codec_context.sample_rate
        # FLAC's frames are interleaved.
        samples = np.concatenate([block.reshape(-1, num_channels).T for block in blocks], axis=1)
    return np.ascontiguousarray(samples).astype(np.float32) / np.float32(32768), rate_hz


def spectrogram(sound: Sound | Tensor, rate_hz: int, width: int, height: int) -> Pixels:
    """A picture, uint8 [height, width, 3]: time to the right, mel upwards, louder is brighter."""
    samples = torch.as_tensor(np.asarray(sound, dtype=np.float32)).mean(0, keepdim=True)
    hop = max(1, samples.shape[1] // width)
    num_samples = hop * max(1, samples.shape[1] // hop)
    # Powers of two, as long as low bands need.
    window = 1 << max(4 * hop - 1, rate_hz // 20).bit_length()
    bands = min(height, MAX_BANDS)
    config = MelConfig(hop=hop, window=window, num_bands=bands, floor_db=FLOOR_DB)
    codec = config.build(torch.device("cpu"), SoundFormat(rate_hz, 1))
    level = (codec.encode(samples[:, :num_samples])[:, :, 0, 0].numpy() + 1) / 2
    rows = (np.arange(height)[::-1] * bands) // height
    columns = (np.arange(width) * level.shape[1]) // width
    place = np.clip(level[rows][:, columns], 0, 1) * (len(INK) - 1)
    below = np.minimum(place.astype(int), len(INK) - 2)
    part = (place - below)[..., None]
    ink = np.array(INK, dtype=np.float64)
    picture: Pixels = np.rint(ink[below] * (1 - part) + ink[below + 1] * part).astype(np.uint8)
    return picture


def _write_flac(path: Path, samples: npt.NDArray[np.int16], rate_hz: int) -> None:
    av = require_av("writing FLAC")
    options = {"fflags": "+bitexact"}
    with av.open(str(path), "w", format="flac", container_options=options) as container:
        stream = container.add_stream("flac", rate=rate_hz)
        stream.layout = "mono" if samples.shape[0] == 1 else "stereo"
        stream.format = "s16"
        stream.options = {"flags": "+bitexact"}
        for frame in sound_frames(av, samples, rate_hz, "s16", BLOCK):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
