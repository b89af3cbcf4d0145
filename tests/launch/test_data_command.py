"""`kinodit data` as a person types it: what it prints, its exit codes, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinodit.data import writer as writer_module
from kinodit.data.manifest import Dataset
from kinodit.launch.cli import main
from tests.data.clips import clip_bytes
from tests.data.shards import picture, write_images, write_tar


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `kinodit data WORDS`."""
    code = main(["data", *map(str, words)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "clip.mp4").write_bytes(clip_bytes(12, 12))
    (folder / "clip.txt").write_text("bars that count")
    (folder / "broken.mp4").write_bytes(b"no clip")
    (folder / "broken.txt").write_text("nothing")
    return folder


def test_pack_validate_stats_preview(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "d"
    code, out, err = run(capsys, "pack", media, dst)
    assert (code, out) == (2, "")
    assert err.startswith("error: 1 of 2 media cannot be packed; nothing was written.")
    assert "broken.mp4: it cannot be opened or decoded" in err
    code, out, err = run(capsys, "pack", media, dst, "--skip-bad", "--name", "bars")
    assert code == 0
    assert "1 samples in 1 shard(s)" in out
    assert "1 left out" in out
    assert "left out: broken.mp4" in err
    assert Dataset(dst).name == "bars"
    assert run(capsys, "pack", media, dst, "--skip-bad")[0] == 2

    code, out, _ = run(capsys, "validate", dst, "--decode")
    assert (code, out) == (0, f"{dst}: 1 of 1 samples are good; no problems\n")

    code, out, _ = run(capsys, "stats", dst)
    assert code == 0
    assert "64x48" in out
    code, out, _ = run(capsys, "stats", dst, "--json")
    assert json.loads(out)["modalities"][0]["num_frames"] == 12

    code, out, _ = run(capsys, "preview", dst)
    page = tmp_path / "d.preview.html"
    assert out.startswith(f"{page}: 1 samples")
    assert "bars that count" in page.read_text()
    assert validate_again(capsys, dst) == 0


def validate_again(capsys: pytest.CaptureFixture[str], dst: Path) -> int:
    """Nothing a command writes beside a dataset may spoil it."""
    return run(capsys, "validate", dst)[0]


def test_validate_prints_what_is_wrong_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_images(tmp_path / "d")
    path, _, _ = dataset.locate(0)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 4] ^= 1
    path.write_bytes(data)
    code, out, _ = run(capsys, "validate", tmp_path / "d")
    assert code == 1
    assert out.startswith("000000.tar: image-000: expected CRC-32")
    assert "11 of 12 samples are good; 1 problems" in out


def test_index_makes_a_dataset_of_foreign_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": picture(), "0.txt": b"blue"})
    code, out, _ = run(capsys, "index", tmp_path, "--name", "others")
    assert (code, out) == (0, f"{tmp_path}: 1 samples in 1 shard(s)\n")
    assert run(capsys, "validate", tmp_path)[0] == 0
    write_tar(tmp_path / "b.tar", {"0.pkl": b"."})
    code, _, err = run(capsys, "index", tmp_path)
    assert code == 2
    assert "b.tar: sample '0': member 'pkl' is not allowed" in err


def test_demo_makes_a_dataset_and_takes_a_subset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "d"
    words = (
        "--num-clips 8 --num-images 2 --num-sounds 1 --no-real-clips --size 32 --actions move "
        "--backgrounds plain --sprites frog,rocket --sounds object --workers 1"
    )
    code, out, _ = run(capsys, "demo", dst, *words.split())
    assert code == 0
    assert "11 samples in 1 shard(s)" in out
    code, out, _ = run(capsys, "preview", dst, "--out", tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert "moves left over a" in page
    assert "a rocket moves" in page and "with a middle rising tone" in page
    assert "turns" not in page
    assert run(capsys, "demo", dst, *words.split())[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stats", "{tmp}/nowhere"], "is not a dataset: it has no manifest.json"),
        (["validate", "{tmp}"], "is not a dataset"),
        (["preview", "{tmp}/nowhere"], "is not a dataset"),
        (["index", "{tmp}"], "has no shards"),
        (["pack", "{tmp}/nowhere", "{tmp}/d"], "it does not exist"),
        (["pack", "{tmp}", "{tmp}/d"], "holds no media to pack"),
        (["pack", "{tmp}", "{tmp}/d", "--shard-mb", "0"], "shard-mb is 0"),
        (["demo", "{tmp}/d", "--actions", "jump"], "choose of move, turn, grow, shrink"),
        (["demo", "{tmp}/d", "--size", "20"], "size is 20"),
        (["demo", "{tmp}/d", "--workers", "0"], "workers is 0"),
        (["demo", "{tmp}/d", "--stamps", "{tmp}", "--workers", "1"], "has no stamps"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, out, err = run(capsys, *(word.format(tmp=tmp_path) for word in words))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "d").exists()


def test_a_full_disk_is_one_line(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(shard: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module.ShardFile, "_put", full)
    code, _, err = run(capsys, "pack", media, tmp_path / "d", "--skip-bad")
    assert code == 2
    assert "error: the disk is full" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["media"]
