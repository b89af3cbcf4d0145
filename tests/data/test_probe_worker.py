"""A medium that hangs or crashes what is to learn what it is costs itself, and is named."""

from __future__ import annotations

import itertools
import os
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from kinodit.data.config import DecodeConfig
from kinodit.data.given import GivenError, read_given, read_references
from kinodit.data.index import ManifestError
from kinodit.data.indexing import IndexOptions, index_shards
from kinodit.data.manifest import Dataset
from kinodit.data.pack import PackError, pack
from kinodit.data.probe import MediumError, probe
from kinodit.data.probe_worker import ProbeWorker
from kinodit.data.remux import remux
from tests.data.clips import clip_bytes
from tests.data.shards import picture, write_tar
from tests.support.decoders import struck
from tests.support.quick import quick

SAID = {
    "hold": "opening it takes longer than 1 s: its decoder hung and was killed",
    "crash": "its decoder crashed, and did so again in a new process",
}
"""Of a medium that is opened to learn what it is."""
LIMIT_S = {"hold": 1.0, "crash": 60.0}
"""How long that may take: short only where it is waited for."""


def write_pictures(folder: Path) -> None:
    """Two shards of another tool, which says no sizes: three pictures each."""
    folder.mkdir()
    for shard in range(2):
        numbers = range(3 * shard, 3 * shard + 3)
        members = [
            (f"p{n}.{name}", data) for n in numbers for name, data in
            (("png", picture(n)), ("txt", b"a colour"))
        ]  # fmt: skip
        write_tar(folder / f"{shard}.tar", members)


def is_fourth(extension: str, data: bytes) -> bool:
    return data == picture(4)


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("harm", ["hold", "crash"])
def test_an_index_leaves_it_out_or_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, skip_bad: bool
) -> None:
    folder = tmp_path / "d"
    write_pictures(folder)
    monkeypatch.setattr("kinodit.data.indexing.ProbeWorker", partial(ProbeWorker, LIMIT_S[harm]))
    options = IndexOptions(skip_bad=skip_bad)
    with struck(monkeypatch, "kinodit.data.probe_worker.probe", is_fourth, harm):
        if not skip_bad:
            with pytest.raises(ManifestError) as error:
                index_shards(folder, "d", options)
            assert str(error.value) == f"{folder / '1.tar'}: sample 'p4': {SAID[harm]}"
            return
        report = index_shards(folder, "d", options)
    ((shard, damage),) = report.left_out
    assert (shard, damage.key, damage.offset) == ("1.tar", "p4", 2048)
    assert damage.reason == f"sample 'p4': {SAID[harm]}"
    dataset = Dataset(folder)
    assert [dataset.row(n).width for n in range(len(dataset))] == [16] * 5


@pytest.mark.parametrize(
    ("harm", "skip_bad", "bad"),
    quick(
        (
            (*one, bad)
            for one in (("hold", True), ("crash", True), ("crash", False))
            for bad in ("picture", "reference", "other container")
        ),
        ("hold", True, "other container"),
        ("crash", True, "reference"),
        ("crash", False, "picture"),
    ),
)
def test_a_pack_has_it_among_the_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, skip_bad: bool, bad: str
) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for number in range(3):
        (media / f"p{number}.png").write_bytes(picture(number))
    (media / "p2.ref0.png").write_bytes(picture(4 if bad == "reference" else 3))
    name, where = "p2.png", "p2.png: p2.ref0.png" if bad == "reference" else "p2.png"
    if bad == "picture":
        (media / name).write_bytes(picture(4))
    if bad == "other container":
        (media / "p2.png").unlink()
        name = where = "p2.mkv"
        (media / name).write_bytes(picture(4))
    target = "remux" if bad == "other container" else "probe"
    monkeypatch.setattr("kinodit.data.pack.ProbeWorker", partial(ProbeWorker, LIMIT_S[harm]))

    def is_bad(*args: str | bytes) -> bool:
        return picture(4) in args

    with struck(monkeypatch, f"kinodit.data.probe_worker.{target}", is_bad, harm):
        if not skip_bad:
            with pytest.raises(PackError, match="1 of 3 media cannot be packed; nothing") as error:
                pack(media, tmp_path / "d", allow_uncaptioned=True)
            assert str(error.value).endswith(f"\n  {where}: {SAID[harm]}")
            assert not (tmp_path / "d").exists()
            return
        report = pack(media, tmp_path / "d", skip_bad=True, allow_uncaptioned=True)
    assert report.bad == (f"{where}: {SAID[harm]}",)
    assert report.manifest.num_samples == 2


@pytest.mark.parametrize(
    ("harm", "at"),
    quick(
        itertools.product(
            ["hold", "crash"], ["probe_worker.probe", "probe_worker.remux", "worker.decode"]
        ),
        *(("crash", at) for at in ("probe_worker.probe", "probe_worker.remux")),
        ("hold", "worker.decode"),
    ),
)
def test_a_file_that_a_task_is_given_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, at: str
) -> None:
    path = tmp_path / "given.mov"
    path.write_bytes(clip_bytes(8, 12))
    limit_s = LIMIT_S[harm]
    monkeypatch.setattr("kinodit.data.given.ProbeWorker", partial(ProbeWorker, limit_s))
    config = DecodeConfig(
        height=16, width=16, num_frames=1, max_references=1, decode_limit_s=limit_s
    )
    deadly = struck(monkeypatch, f"kinodit.data.{at}", lambda *_: True, harm)
    with deadly, pytest.raises(GivenError) as error:
        if harm == "hold":
            read_given(path, config)
        else:
            read_references([path], config)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    assert SAID[harm].rpartition(": ")[2] in said
    if harm == "crash":
        assert read_given(path, config).video is not None


def test_copying_streams_elsewhere_gives_the_same_bytes() -> None:
    clip = clip_bytes(8, 12, onset=2000)
    with closing(ProbeWorker()) as worker:
        assert worker.remux(clip, "mov") == remux(clip, "mov")
        with pytest.raises(MediumError, match="its streams cannot be copied into an mp4"):
            worker.remux(b"garbage" * 99, "avi")
        assert worker.probe("mp4", clip) == probe("mp4", clip)


def test_what_a_process_left_that_died_is_no_part_of_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, marker = clip_bytes(8, 12), tmp_path / "died"

    def dies_once(request: tuple[str, bytes, int]) -> bool:
        if marker.exists():
            return False
        marker.touch()
        return os.write(request[2], bytes(1 << 20)) > 0

    deadly = struck(monkeypatch, "kinodit.data.probe_worker._answer", dies_once, "crash")
    with deadly, closing(ProbeWorker()) as worker:
        assert worker.remux(clip, "mov") == remux(clip, "mov")
    assert marker.exists()
