"""From what users have to shards: folders, tables, sidecars, other containers, bad media."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import pytest

from kinodit.data.manifest import Dataset
from kinodit.data.pack import PackError, PackReport, Progress, pack
from kinodit.data.probe import MediumError, probe
from kinodit.data.reader import ShardReader
from kinodit.data.record import Caption, Record
from kinodit.data.source import SourceError
from kinodit.data.writer import WriterError
from tests.data.clips import barcode, clip_bytes
from tests.data.shards import picture

SIZE = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
"""Of a small PNG, as its first part says it."""


@pytest.fixture(scope="module")
def clip() -> bytes:
    """24 frames of 64 x 48 at 12 per second, with sound."""
    return clip_bytes(24, 12, onset=4000)


def records(directory: Path) -> dict[str, Record]:
    reader = ShardReader(Dataset(directory))
    found = [reader.read(index) for index in range(len(reader.dataset))]
    return {record.key: record for record in found}


def packed(source: Path, **options: Any) -> dict[str, Record]:
    destination = source.parent / "packed"
    pack(source, destination, **options)
    return records(destination)


def test_a_folder_with_sidecars(tmp_path: Path, clip: bytes) -> None:
    source = tmp_path / "media"
    (source / "Sub Dir").mkdir(parents=True)
    (source / "b clip.mp4").write_bytes(clip)
    (source / "b clip.txt").write_text("  a clip\nof bars ")
    (source / "Sub Dir" / "Photo.JPEG").write_bytes(jpeg())
    (source / "Sub Dir" / "Photo.json").write_text(
        json.dumps({
            "captions": ["one", {"text": "zwei", "lang": "de", "weight": 0.5}],
            "aesthetic": 5.5, "camera": "old", "source": "attic", "license": "CC0-1.0",
        })
    )  # fmt: skip
    (source / "readme.md").write_text("not a medium")
    (source / ".hidden.png").write_bytes(b"")
    report = pack(source, tmp_path / "d", name="mine")
    assert isinstance(report, PackReport)
    assert report.ignored == {".md": 1}
    assert Dataset(tmp_path / "d").name == "mine"
    found = records(tmp_path / "d")
    assert list(found) == ["sub-dir-photo", "b-clip"]
    meta = found["b-clip"].meta
    assert meta.captions == (Caption("a clip of bars"),)
    assert (meta.width, meta.height, meta.num_frames, meta.fps) == (64, 48, 24, 12.0)
    assert meta.duration_s == pytest.approx(2.0, abs=0.1)
    assert (meta.has_audio, meta.sample_rate, meta.id) == (True, 16_000, "b clip.mp4")
    assert found["b-clip"].members == {"mp4": clip}
    photo = found["sub-dir-photo"].meta
    assert photo.captions == (Caption("one"), Caption("zwei", "de", "", 0.5))
    assert (photo.modality, photo.scores, photo.extra) == (
        "image", {"aesthetic": 5.5}, {"camera": "old"},
    )  # fmt: skip
    assert (photo.source, photo.licence) == ("attic", "CC0-1.0")


def jpeg() -> bytes:
    from PIL import Image

    target = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 90, 200)).save(target, "JPEG")
    return target.getvalue()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_table_of_paths_and_captions(tmp_path: Path, clip: bytes, suffix: str) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "1.mp4").write_bytes(clip)
    (tmp_path / "p.png").write_bytes(picture())
    rows = [
        {"path": "clips/1.mp4", "caption": 'bars, "numbered"', "motion": "0.5", "shot": "wide"},
        {"path": "p.png", "caption": "blue", "motion": "", "shot": ""},
    ]
    table = tmp_path / f"table{suffix}"
    if suffix == ".jsonl":
        table.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        import csv

        with table.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="," if suffix == ".csv" else "\t"
            )
            writer.writeheader()
            writer.writerows(rows)
    found = packed(table)
    assert list(found) == ["clips-1", "p"]
    assert found["clips-1"].meta.captions == (Caption('bars, "numbered"'),)
    assert found["clips-1"].meta.scores == {"motion": 0.5}
    assert found["clips-1"].meta.extra == {"shot": "wide"}
    assert (found["p"].meta.scores, found["p"].meta.extra) == ({}, {})


def test_equal_names_get_keys_of_their_own_and_order_is_stable(tmp_path: Path) -> None:
    source = tmp_path / "media"
    source.mkdir()
    for name in ("A b.png", "a-b.png", "ä.png", "x" * 150 + ".png"):
        (source / name).write_bytes(picture())
    keys = list(packed(source, allow_uncaptioned=True))
    assert len(set(keys)) == 4
    assert keys[0] == "a-b"
    assert all(len(key) <= 128 for key in keys)


def copied(clip: bytes, path: Path, **options: str) -> None:
    """The streams of `clip` in the container that `path` asks for."""
    with av.open(io.BytesIO(clip)) as given, av.open(str(path), "w", options=options) as other:
        copies = {stream.index: other.add_stream_from_template(stream) for stream in given.streams}
        for packet in given.demux():
            if packet.dts is not None:
                packet.stream = copies[packet.stream.index]
                other.mux(packet)


def old_avi(path: Path) -> None:
    """24 frames in the codec that AVI files have: MPEG-4 part 2."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(24):
            frame = av.VideoFrame.from_ndarray(barcode(number, 48, 64), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def payloads(data: bytes, **options: Any) -> list[bytes]:
    """The coded frames of a file."""
    with av.open(io.BytesIO(data), **options) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("suffix", [".mov", ".mkv", ".avi"])
def test_other_containers_are_remuxed_without_encoding(
    tmp_path: Path, clip: bytes, suffix: str
) -> None:
    path = tmp_path / "media" / f"c{suffix}"
    path.parent.mkdir()
    if suffix == ".avi":
        old_avi(path)
    else:
        copied(clip, path)
    path.with_suffix(".txt").write_text("bars")
    (record,) = packed(path.parent).values()
    assert (record.meta.num_frames, record.meta.has_audio) == (24, suffix != ".avi")
    assert payloads(bytes(record.members["mp4"])) == payloads(path.read_bytes())


def bad_folder(tmp_path: Path, clip: bytes) -> Path:
    source = tmp_path / "media"
    source.mkdir()
    media = {
        "good.mp4": clip,
        "cut.mp4": clip[: len(clip) // 2],
        "text.png": b"this is no picture",
        "song.mp3": b"",
        "silent.png": picture(),
        "list.webm": b"#EXTM3U\nfile:///etc/passwd\n",
    }
    for name, data in media.items():
        (source / name).write_bytes(data)
        if name != "silent.png":
            (source / name).with_suffix(".txt").write_text("a caption")
    return source


def test_bad_media_are_listed_and_nothing_is_written(tmp_path: Path, clip: bytes) -> None:
    with pytest.raises(PackError, match="5 of 6 media cannot be packed; nothing was written") as e:
        pack(bad_folder(tmp_path, clip), tmp_path / "d")
    lines = str(e.value)
    for reason in (
        "cut.mp4: it cannot be opened or decoded",
        "text.png: it is damaged or not a JPEG",
        "song.mp3: files of type .mp3",
        "silent.png: it has no caption",
        "list.webm: it cannot be opened",
        "--skip-bad",
    ):
        assert reason in lines
    assert not (tmp_path / "d").exists()


def test_skip_bad_leaves_them_out_and_counts(tmp_path: Path, clip: bytes) -> None:
    seen: list[Progress] = []
    source = bad_folder(tmp_path, clip)
    report = pack(source, tmp_path / "d", skip_bad=True, progress=seen.append)
    assert list(records(tmp_path / "d")) == ["good"]
    assert len(report.bad) == 5
    assert [progress.done for progress in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1].num_bad == 5
    with pytest.raises(WriterError, match="not an empty folder"):
        pack(source, tmp_path / "d", skip_bad=True)
    (source / "good.mp4").unlink()
    with pytest.raises(PackError, match="none of the 5 media"):
        pack(source, tmp_path / "e", skip_bad=True)


def test_many_bad_media_end_the_pack_early(tmp_path: Path) -> None:
    source = tmp_path / "media"
    source.mkdir()
    for number in range(30):
        (source / f"{number:02d}.png").write_bytes(b"x")
    with pytest.raises(PackError, match=r"10 of 30 media cannot be packed \(there may be more\)"):
        pack(source, tmp_path / "d", allow_uncaptioned=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "file_name,words\na,b\n", r"columns 'path' and 'caption'; it has \['file_name'"),
        ("t.csv", "", "needs the columns"),
        ("t.jsonl", "{\n", "cannot be read"),
        ("t.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("t.csv", "path,caption\n", "holds no media"),
        ("t.txt", "path,caption\n", "not a folder or a table"),
    ],
)
def test_a_source_that_is_none_is_explained(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        pack(tmp_path / name, tmp_path / "d")


def test_empty_and_missing_folders_are_explained(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.md").write_text("")
    with pytest.raises(SourceError, match=r"holds no media to pack \(found: 1 \.md\)"):
        pack(tmp_path / "in", tmp_path / "d")
    with pytest.raises(SourceError, match="it does not exist"):
        pack(tmp_path / "nowhere", tmp_path / "d")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": "missing.png", "caption": "x"}, "missing.png: there is no such file"),
        ({"caption": "x"}, "table.jsonl line 1: it has no 'path'"),
        ({"path": "p.png", "captions": "x"}, "'captions' must be a list"),
        ({"path": "p.png", "captions": [{"words": "x"}]}, "a caption must be"),
        ({"path": "p.png", "captions": [{"text": "x", "weight": "much"}]}, "captions.weight"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "p.png").write_bytes(picture())
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps(row))
    with pytest.raises(PackError, match=message):
        pack(table, tmp_path / "d")


def test_probing_counts_what_is_there(clip: bytes) -> None:
    facts = probe("mp4", clip)
    assert (facts.width, facts.height, facts.num_frames, facts.has_audio) == (64, 48, 24, True)
    webm = probe("webm", clip_bytes(10, 5, extension="webm"))
    assert (webm.num_frames, webm.fps, webm.has_audio) == (10, 5.0, False)
    with pytest.raises(MediumError, match=r"no audio stream|cannot be opened"):
        probe("wav", clip)
    with pytest.raises(MediumError, match="not the extension of a medium"):
        probe("pkl", b"")


def test_a_clip_cut_off_behind_its_table_of_contents_is_noticed(tmp_path: Path) -> None:
    """With the table in front it opens and its first frames decode: only counting tells."""
    path = tmp_path / "clip.mp4"
    copied(clip_bytes(48, 12), path, movflags="+faststart")
    data = path.read_bytes()
    frames = data.index(b"mdat")
    assert data.index(b"moov") < frames
    assert probe("mp4", data).num_frames == 48
    with pytest.raises(MediumError, match=r"it is cut off: \d+ of 48 frames are there"):
        probe("mp4", data[: (frames + len(data)) // 2])


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these (kind, data)."""
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("chunks", [[(b"IHDR", b"\0" * 5)], [(b"IHDR", SIZE), (b"pHYs", b"\0")]])
def test_a_picture_with_a_part_that_is_too_short_is_damaged(
    chunks: list[tuple[bytes, bytes]],
) -> None:
    with pytest.raises(MediumError, match="damaged or not a JPEG, PNG"):
        probe("png", png(*chunks, (b"IDAT", zlib.compress(b""))))


def test_a_picture_that_would_fill_the_memory_is_not_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = png((b"IHDR", header), (b"IDAT", zlib.compress(b"")))
    with pytest.raises(MediumError, match=r"60000x60000|exceeds limit"):
        probe("png", bomb)
