"""Means and deviations of a wavelet codec's subbands: measured once, kept as JSON with a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kinodit.models.encoders.base import EncoderError

SCHEMA = 1

# One grey level: a subband that hardly moves in the sample must not blow up rare detail.
MIN_STD = 1 / 127.5


@dataclass(frozen=True)
class BandStatistics:
    """Mean and standard deviation of one subband's coefficients, per colour (R, G, B)."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Standardisation:
    """Statistics of every subband, in the codec's order, and how many clips they come from."""

    subbands: tuple[BandStatistics, ...]
    num_videos: int

    @staticmethod
    def measured(
        names: Sequence[str],
        mean_G3: Sequence[Sequence[float]],
        std_G3: Sequence[Sequence[float]],
        num_videos: int,
    ) -> Standardisation:
        """From measured moments; deviations are at least one grey level."""
        bands = []
        for name, mean, std in zip(names, mean_G3, std_G3, strict=True):
            low = [max(value, MIN_STD) for value in std]
            bands.append(
                BandStatistics(name, (mean[0], mean[1], mean[2]), (low[0], low[1], low[2]))
            )
        return Standardisation(tuple(bands), num_videos)

    def save(self, file: Path) -> None:
        """Write JSON that `load` reads back exactly."""
        document = {"schema": SCHEMA, **asdict(self)}
        file.write_text(json.dumps(document, indent=1) + "\n")

    @staticmethod
    def load(file: Path) -> Standardisation:
        """Read what `save` wrote. Raises EncoderError for a missing or malformed file."""
        try:
            document = json.loads(file.read_text())
        except OSError as error:
            raise EncoderError(
                f"cannot read the wavelet standardisation {file}: {error.strerror}"
            ) from error
        except ValueError as error:
            raise EncoderError(f"{file} is not JSON: {error}") from error
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise EncoderError(
                f"{file} has standardisation schema {schema}, this version reads {SCHEMA}"
            )
        try:
            bands = [
                (str(band["name"]), _triple(band["mean"]), _triple(band["std"]))
                for band in document["subbands"]
            ]
            num_videos = int(document["num_videos"])
        except (KeyError, TypeError, ValueError) as error:
            raise EncoderError(
                f"{file} is not a wavelet standardisation: {type(error).__name__} {error}"
            ) from error
        if not all(value > 0 for _, _, std in bands for value in std):
            raise EncoderError(f"{file} has a standard deviation that is not above 0")
        return Standardisation(
            tuple(BandStatistics(name, mean, std) for name, mean, std in bands), num_videos
        )


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
