"""Statistics are counted from the index: they must agree with what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kinodit.data.record import Caption, Record, RecordMeta
from kinodit.data.stats import DatasetStats, collect, table
from tests.data.clips import write_dataset


def make(tmp_path: Path) -> DatasetStats:
    def record(key: str, **fields: object) -> Record:
        extension = {"video": "mp4", "image": "png", "audio": "wav"}[str(fields["modality"])]
        return Record(key, RecordMeta(id=key, **fields), {extension: b"x" * 600})  # type: ignore[arg-type]

    wide = {"modality": "video", "width": 640, "height": 360, "fps": 24.0, "num_frames": 96}
    records = [
        *(
            record(f"w{n}", **wide, duration_s=4.0, has_audio=True, captions=(Caption("x" * 50),))
            for n in range(3)
        ),
        record("t", **{**wide, "width": 360, "height": 640}, duration_s=1.5),
        record("i", modality="image", width=640, height=360, captions=(Caption("a"),)),
        record(
            "a", modality="audio", duration_s=1800.0, has_audio=True, captions=(Caption("hum"),)
        ),
    ]
    return collect(write_dataset(tmp_path / "mix", records, shard_bytes=5000))


def test_counts_hours_and_histograms(tmp_path: Path) -> None:
    stats = make(tmp_path)
    assert (stats.name, stats.num_samples, stats.num_uncaptioned) == ("mix", 6, 1)
    video, image, audio = stats.modalities
    assert (video.modality, video.num_samples, video.num_frames) == ("video", 4, 384)
    assert np.isclose(video.hours, 13.5 / 3600)
    assert (video.num_with_audio, image.num_with_audio, audio.num_with_audio) == (3, 0, 1)
    assert np.isclose(audio.hours, 0.5)
    assert stats.resolutions == [("640x360", 4), ("360x640", 1)]
    assert stats.rates == [("24", 4)]
    assert [pair for pair in stats.durations if pair[1]] == [
        ("1 to 2", 1), ("4 to 6", 3), ("60 and more", 1),
    ]  # fmt: skip
    assert [pair for pair in stats.caption_chars if pair[1]] == [
        ("0", 1), ("1 to 20", 2), ("40 to 80", 3),
    ]  # fmt: skip
    assert stats.num_bytes == sum(path.stat().st_size for path in (tmp_path / "mix").glob("*.tar"))


def test_the_table_shows_them(tmp_path: Path) -> None:
    text = table(make(tmp_path))
    assert "mix: 6 samples in" in text
    assert "1 samples have no caption" in text
    assert "640x360" in text
    longest = max(text.splitlines(), key=lambda line: line.count("█"))
    assert longest.count("█") == 30


def test_many_resolutions_are_summed_up(tmp_path: Path) -> None:
    records = [
        Record(
            f"i{side}",
            RecordMeta(id="x", modality="image", width=side, height=8, captions=(Caption("a"),)),
            {"png": b"x"},
        )
        for side in range(8, 28)
    ]
    resolutions = collect(write_dataset(tmp_path / "d", records)).resolutions
    assert len(resolutions) == 12
    assert resolutions[-1] == ("9 others", 9)
