"""Reference pictures of a sample: from files to shards to pixels; what is refused on the way."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from msgspec import structs
from PIL import Image

from kinodit.data.captions import with_references
from kinodit.data.config import DataConfig, DecodeConfig
from kinodit.data.decode import DecodeError, View, decode
from kinodit.data.given import GivenError, read_references
from kinodit.data.latents import Encoded, decoding_of
from kinodit.data.manifest import Dataset
from kinodit.data.pack import PackError, pack
from kinodit.data.preview import preview
from kinodit.data.reader import ShardReader
from kinodit.data.record import Record, RecordError, encode_record, parse_record
from kinodit.data.shared_media import DecodedRecord, SharedMedia
from kinodit.data.source import SourceError
from kinodit.data.validate import validate
from kinodit.data.worker import DecodeWorker
from kinodit.models.encoders.base import Posterior
from tests.data.clips import described
from tests.data.shards import image_record, picture

CONFIG = DecodeConfig(height=16, width=16, max_references=2)


def with_pictures(*pictures: bytes, **changes: object) -> Record:
    """An image with these reference pictures, numbered."""
    record = image_record(3, references=("",) * len(pictures), **changes)
    references = {f"ref{number}.png": data for number, data in enumerate(pictures)}
    return structs.replace(record, members={**record.members, **references})


def again(record: Record) -> Record:
    """The record from its bytes."""
    sample = encode_record(record)
    members = {name: data for name, data in sample.items() if name != "__key__"}
    assert all(isinstance(data, bytes) for data in members.values())
    return parse_record(record.key, members)  # type: ignore[arg-type]


def test_a_record_keeps_its_pictures_and_their_captions() -> None:
    record = with_pictures(picture(1), picture(2))
    record = described(record, references=("a bell", ""))
    found = again(record)
    assert found == record
    assert found.references == [("ref0.png", picture(1)), ("ref1.png", picture(2))]


def test_a_record_without_any_has_the_bytes_that_it_had() -> None:
    document = encode_record(image_record(3))["json"]
    assert isinstance(document, bytes) and "references" not in json.loads(document)


def test_shards_of_other_tools_may_have_some() -> None:
    members = {"png": picture(0), "txt": b"x", "ref0.png": picture(1), "ref1.png": picture(2)}
    assert parse_record("k", members).meta.references == ("", "")


MEDIA = {"png": picture(0), "txt": b"x"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({**MEDIA, "ref1.png": b"p"}, "without a gap"),
        ({**MEDIA, "ref0.png": b"p", "ref0.jpg": b"p"}, "without a gap"),
        ({**MEDIA, "ref8.png": b"p"}, "'ref8.png' is not allowed"),
        ({**MEDIA, "ref00.png": b"p"}, "'ref00.png' is not allowed"),
        ({**MEDIA, "ref0.mp4": b"p"}, "'ref0.mp4' is not allowed"),
        ({**MEDIA, "ref0.pkl": b"p"}, "'ref0.pkl' is not allowed"),
        ({"wav": b"s", "ref0.png": b"p"}, "is a sound and has reference pictures"),
    ],
)
def test_members_that_cannot_be_are_refused(members: Mapping[str, bytes], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        parse_record("k", members)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("a bell", "a list of at most 8 captions"),
        ([""] * 9, "a list of at most 8 captions"),
        ([7], "strings, one for each"),
        (["a", "b"], "has 1 reference pictures, its JSON speaks of 2"),
        ([], "has 1 reference pictures, its JSON speaks of 0"),
    ],
)
def test_captions_that_do_not_fit_are_refused(said: object, message: str) -> None:
    document = {"schema": 1, "id": "x", "modality": "image", "references": said}
    members = {"png": b"p", "ref0.png": b"p", "json": json.dumps(document).encode()}
    with pytest.raises(RecordError, match=message):
        parse_record("k", members)


def test_pictures_are_decoded_as_the_sample_itself_is() -> None:
    record = with_pictures(picture(5, side=40), picture(9, side=8))
    media = decode(record, CONFIG)
    assert media.references is not None and media.references.shape == (2, 16, 16, 3)
    alone = [Record("x", record.meta, {"png": data}) for _, data in record.references]
    for found, one in zip(media.references, alone, strict=True):
        video = decode(one, replace(CONFIG, max_references=0)).video
        assert video is not None and torch.equal(found, video[0])
    assert media.num_bytes == 3 * 16 * 16 * 3
    without = decode(record, replace(CONFIG, max_references=0))
    assert without.references is None and without.video is not None and media.video is not None
    assert torch.equal(without.video, media.video)
    assert decode(image_record(1), CONFIG).references is None


def test_a_process_of_its_own_gives_the_same_bits() -> None:
    record = with_pictures(picture(5, side=40), picture(9, side=8))
    worker = DecodeWorker()
    try:
        for config in (CONFIG, replace(CONFIG, max_references=5), CONFIG):
            ours, theirs = decode(record, config), worker.decode(record, config, 0.0, (0.5, 0.5))
            assert ours.references is not None and theirs.references is not None
            assert torch.equal(ours.references, theirs.references)
            assert ours.video is not None and theirs.video is not None
            assert torch.equal(ours.video, theirs.video)
        assert worker.decode(image_record(1), CONFIG, 0.0, (0.5, 0.5)).references is None
        with pytest.raises(DecodeError, match="has 2 reference pictures"):
            worker.decode(record, replace(CONFIG, max_references=1), 0.0, (0.5, 0.5))
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("record", "config", "message"),
    [
        (
            with_pictures(picture(1), picture(2), picture(3)),
            CONFIG,
            "has 3 reference pictures; data.max_references allows 2",
        ),
        (
            with_pictures(picture(1), picture(2, side=64)),
            replace(CONFIG, max_pixels=32 * 32),
            "member 'ref1.png'.*data.max_pixels",
        ),
        (
            with_pictures(b"#EXTM3U\nfile:///etc/passwd"),
            CONFIG,
            "member 'ref0.png': its picture size",
        ),
        (
            with_pictures(picture(1)[:60]),
            CONFIG,
            "member 'ref0.png': its picture size cannot be read",
        ),
    ],
)
def test_hostile_pictures_are_refused_by_name(
    record: Record, config: DecodeConfig, message: str
) -> None:
    with pytest.raises(DecodeError, match=message) as caught:
        decode(record, config)
    assert caught.value.key == record.key


def save(path: Path, number: int) -> None:
    path.write_bytes(picture(number))


def folder(root: Path) -> Path:
    source = root / "media"
    source.mkdir()
    for name, number in (("a", 1), ("a.ref1", 3), ("a.ref0", 2), ("b", 4)):
        save(source / f"{name}.png", number)
    for name, caption in (("a", "the same"), ("a.ref0", " a  bell "), ("b", "alone")):
        (source / f"{name}.txt").write_text(caption)
    return source


def packed(source: Path, root: Path) -> dict[str, Record]:
    pack(source, root / "data")
    reader = ShardReader(Dataset(root / "data"))
    return {r.key: r for r in map(reader.read, range(len(reader.dataset)))}


def test_a_folder_names_pictures_after_their_medium(tmp_path: Path) -> None:
    found = packed(folder(tmp_path), tmp_path)
    assert list(found) == ["a", "b"]
    assert found["a"].references == [("ref0.png", picture(2)), ("ref1.png", picture(3))]
    assert found["a"].meta.references == ("a bell", "")
    assert set(found["a"].meta.sha256) == {"png", "ref0.png", "ref1.png"}
    assert found["b"].references == [] and found["b"].meta.references == ()
    assert validate(tmp_path / "data", decode=True).problems == ()
    page = tmp_path / "page.html"
    preview(Dataset(tmp_path / "data"), page)
    assert "a bell" in page.read_text()


def test_a_table_lists_pictures(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"{number}.png", number)
    row = {
        "path": "0.png",
        "caption": "do the same",
        "references": ["1.png", {"path": "2.png", "caption": "a bell"}],
    }
    (tmp_path / "table.jsonl").write_text(json.dumps(row))
    (record,) = packed(tmp_path / "table.jsonl", tmp_path).values()
    assert [data for _, data in record.references] == [picture(1), picture(2)]
    assert record.meta.references == ("", "a bell") and not record.meta.extra


def lone(source: Path) -> None:
    save(source / "c.ref0.png", 1)


def gap(source: Path) -> None:
    (source / "a.ref0.png").unlink()


def twice(source: Path) -> None:
    Image.new("RGB", (4, 4)).save(source / "a.ref0.jpg")


def damaged(source: Path) -> None:
    (source / "a.ref1.png").write_bytes(b"not a picture")


def many(source: Path) -> None:
    for number in range(2, 9):
        save(source / f"a.ref{number}.png", number)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lone, "c.ref0.png is a reference picture by its name, but beside it is no medium"),
        (gap, r"have the numbers \[1\]"),
        (twice, "there are both a.ref0"),
        (damaged, "a.png: a.ref1.png: "),
        (many, "it has 9 reference pictures; 8 are allowed"),
    ],
)
def test_pictures_that_do_not_fit_are_not_packed(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    source = folder(tmp_path)
    spoil(source)
    with pytest.raises((SourceError, PackError), match=message):
        pack(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_captions_of_pictures_come_first_by_their_numbers() -> None:
    assert with_references(("a bell", "", "an owl"), "both") == "[1] a bell [3] an owl both"
    assert with_references(("", ""), " as it was ") == " as it was "
    assert with_references(("a bell",), "") == "[1] a bell"


def test_a_cache_keeps_what_pictures_were_encoded_to() -> None:
    record = with_pictures(picture(1), picture(2))
    record = described(record, captions=())
    means = [torch.full((2, 1, 3, 3), float(number)) for number in range(3)]
    pictures = Posterior(means[1]), Posterior(means[2], means[0].clone())
    encoded = Encoded({"video": Posterior(means[0])}, {}, View(0, (0.5, 0.5)), 8.0, 0.0, pictures)
    meta = structs.replace(record.meta, sha256={})
    kept = again(Record(record.key, meta, encoded.to_members(meta)))
    found = Encoded.of(kept)
    assert list(found.latents) == ["video"] and len(found.references) == 2
    assert torch.equal(found.references[0].mean, means[1]) and found.references[0].logvar is None
    assert torch.equal(found.references[1].mean, means[2])
    assert found.references[1].logvar is not None
    assert "max_references" not in decoding_of(DataConfig())
    assert decoding_of(DataConfig(max_references=2))["max_references"] == 2


def test_pictures_to_sample_with_are_of_the_clip_s_size(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1)
    target = io.BytesIO()
    Image.new("RGB", (30, 50), (1, 2, 3)).save(target, "PNG")
    (tmp_path / "b.png").write_bytes(target.getvalue())
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    found = read_references(files, CONFIG)
    assert found.shape == (2, 16, 16, 3)
    assert found[1].unique(dim=0).shape[0] == 1 and found[1, 0, 0].tolist() == [1, 2, 3]
    with pytest.raises(GivenError, match="trained with up to 1"):
        read_references(files, replace(CONFIG, max_references=1))


def test_ranks_of_a_node_share_decoded_pictures(tmp_path: Path) -> None:
    record = with_pictures(picture(5, side=40), picture(9, side=8))
    made = DecodedRecord(record.meta, decode(record, CONFIG))
    shared = SharedMedia(tmp_path / "shared")
    shared.sample(3, "key", lambda: made)
    found = SharedMedia(tmp_path / "shared").sample(3, "key", lambda: pytest.fail("made anew"))
    assert found.meta == made.meta
    assert found.media.references is not None and made.media.references is not None
    assert torch.equal(found.media.references, made.media.references)
