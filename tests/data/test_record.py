"""The record contract: what round-trips, and what is refused with the field's name."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinodit.data.record import (
    MAX_JSON_DEPTH,
    MAX_TEXT_BYTES,
    Caption,
    Record,
    RecordError,
    RecordMeta,
    encode_record,
    parse_record,
)
from kinodit.models.errors import UserError

BASE: dict[str, Any] = {"schema": 1, "id": "x", "modality": "image", "width": 4, "height": 4}


def parse(document: object, **members: bytes) -> Record:
    return parse_record("k", {"png": b"p", "json": json.dumps(document).encode(), **members})


text = st.text(st.characters(codec="utf-8"), max_size=20)
number = st.floats(-1e300, 1e300)


@given(
    caption=text,
    weight=st.floats(0, 1e6),
    scores=st.dictionaries(text, number, max_size=3),
    extra=st.dictionaries(text, text, max_size=3),
    fps=st.floats(0, 1000),
    frames=st.integers(0, 10_000),
)
def test_any_valid_record_comes_back_equal_from_its_bytes(
    caption: str,
    weight: float,
    scores: dict[str, float],
    extra: dict[str, str],
    fps: float,
    frames: int,
) -> None:
    meta = RecordMeta(
        id=caption,
        modality="video",
        width=64,
        height=32,
        fps=fps,
        num_frames=frames,
        duration_s=2.0,
        has_audio=True,
        sample_rate=16_000,
        captions=(Caption(caption, "de", "hand", weight), Caption("second")),
        scores=scores,
        extra=extra,
        source="s",
        licence="CC0-1.0",
        sha256={"mp4": "ab"},
    )
    record = Record("a_key-1", meta, {"mp4": b"media", "text.safetensors": b"tensors"})
    sample = encode_record(record)
    assert sample == encode_record(record)
    assert sample["__key__"] == "a_key-1"
    assert sample["txt"] == caption.encode()
    members = {name: data for name, data in sample.items() if isinstance(data, bytes)}
    assert parse_record("a_key-1", members) == record


@pytest.mark.parametrize("key", ["", "A", "a.b", "a/b", "../x", "a b", "ä", "k" * 129, "a\n"])
def test_keys_that_could_be_paths_or_hide_something_are_refused(key: str) -> None:
    with pytest.raises(RecordError, match="sample key"):
        parse_record(key, {"png": b"p"})


@pytest.mark.parametrize(
    "name", ["pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "gz", "py", "v1.mp4", "../mp4", ""]
)
def test_members_that_could_execute_code_are_refused_by_name(name: str) -> None:
    with pytest.raises(RecordError, match="not allowed; allowed are"):
        parse_record("k", {"png": b"p", name: b"cos\nsystem\n(S'touch /tmp/x'\ntR."})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2.*reads schema 1"),
        ({"modality": "smell"}, "'modality' is 'smell'"),
        ({"width": -1}, "'width' is '-1'"),
        ({"width": True}, "'width'"),
        ({"width": 1.5}, "'width'"),
        ({"width": 10**9}, "0 to 16384"),
        ({"fps": "fast"}, "'fps' is 'fast'"),
        ({"duration_s": -0.5}, "duration_s"),
        ({"has_audio": 1}, "true or false"),
        ({"captions": "a cat"}, "a list"),
        ({"captions": [{"lang": "en"}]}, "captions"),
        ({"captions": [{"text": "a", "weight": -1}]}, "captions.weight"),
        ({"scores": {"motion": "high"}}, "scores.motion"),
        ({"scores": {"motion": 10**400}}, "finite"),
        ({"scores": []}, "an object"),
        ({"extra": {"a": 1}}, "extra.a"),
        ({"sharpness": 3}, "'sharpness' is unknown.*under 'scores'"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        parse({**BASE, **change})
    assert "'k'" in str(caught.value)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    "payload", [b"{", b"[1]", b"\xff", b'{"schema": NaN}', b"[" * 200_000, b'{"a": Infinity}']
)
def test_json_that_is_not_an_object_of_finite_numbers_is_refused(payload: bytes) -> None:
    with pytest.raises(RecordError, match="its JSON"):
        parse_record("k", {"png": b"p", "json": payload})


@pytest.mark.parametrize(
    "payload",
    [
        rb'{"caption": "a \ud83d fox"}',
        rb'{"caption": "a \uDC00 fox"}',
        b'{"caption": "a \xed\xa0\x80 fox"}',
        '{"caption": "a \ud83d fox"}'.encode("utf-16-le", "surrogatepass"),
        rb'{"schema": 1, "modality": "image", "extra": {"\ud800": "x"}}',
    ],
)
def test_halves_of_surrogate_pairs_are_refused(payload: bytes) -> None:
    """No encoder of captions takes them: they would end a run."""
    with pytest.raises(RecordError, match="half of a surrogate pair"):
        parse_record("k", {"png": b"p", "json": payload})


@pytest.mark.parametrize("escaped", [False, True])
def test_whole_pairs_and_other_scripts_are_text(escaped: bool) -> None:
    text = "여우 \U0001f98a a fox"
    payload = json.dumps({"caption": text}, ensure_ascii=escaped).encode()
    meta = parse_record("k", {"png": b"p", "json": payload}).meta
    assert [caption.text for caption in meta.captions] == [text]


def test_text_and_members_are_bounded() -> None:
    with pytest.raises(RecordError, match="allowed"):
        parse_record("k", {"png": b"p", "txt": bytes(MAX_TEXT_BYTES + 1)})
    many = {f"m{index}.safetensors": b"" for index in range(17)}
    with pytest.raises(RecordError, match="17 members"):
        parse_record("k", many)


@pytest.mark.parametrize("members", [{}, {"jpg": b""}, {"png": b"", "jpg": b""}])
def test_a_record_has_exactly_one_medium_of_its_modality(members: dict[str, bytes]) -> None:
    document = {**BASE, "modality": "video"} if "png" not in members else BASE
    with pytest.raises(RecordError, match="exactly one of"):
        parse_record("k", {**members, "json": json.dumps(document).encode()})


def test_a_record_of_cached_tensors_needs_no_medium() -> None:
    record = parse_record("k", {"latent.safetensors": b"t", "json": json.dumps(BASE).encode()})
    assert record.medium is None


def test_samples_of_other_tools_are_read_with_what_they_say() -> None:
    plain = parse_record("000123", {"mp4": b"m", "txt": b" a red fox\n"})
    assert plain.meta.modality == "video"
    assert plain.meta.captions == (Caption("a red fox"),)
    assert not plain.meta.is_probed
    document = json.dumps({"caption": "a hen", "url": "https://example.org"}).encode()
    assert parse_record("k", {"jpg": b"", "json": document}).meta.captions == (Caption("a hen"),)
    assert parse_record("k", {"flac": b""}).meta.captions == ()
    with pytest.raises(RecordError, match="no medium and no JSON"):
        parse_record("k", {"txt": b"only text"})
    with pytest.raises(RecordError, match="not UTF-8"):
        parse_record("k", {"jpg": b"", "txt": b"\xff\xfe"})


def test_numbers_that_are_not_finite_cannot_be_written() -> None:
    meta = RecordMeta(id="x", modality="image", scores={"motion": float("nan")})
    with pytest.raises(RecordError, match="not finite"):
        encode_record(Record("k", meta, {"png": b"p"}))


def test_json_is_nested_so_deep_and_no_deeper() -> None:
    def nested(depth: int) -> dict[str, bytes]:
        text = b'{"a": ' * (depth - 1) + b"[]" + b"}" * (depth - 1)
        return {"png": b"x", "json": text}

    assert parse_record("k", nested(MAX_JSON_DEPTH)).key == "k"
    with pytest.raises(RecordError, match=f"nested more than {MAX_JSON_DEPTH} deep"):
        parse_record("k", nested(MAX_JSON_DEPTH + 1))
    # Brackets in strings are no nesting; a quote that never ends takes no time.
    text = json.dumps({"caption": '[{"' * 500}).encode()
    assert parse_record("k", {"png": b"x", "json": text}).meta.captions[0].text == '[{"' * 500
    start = time.process_time()
    for text in (b"[" * 40 + b'"' + b'\\"' * 500_000, b"[" * 1_000_000, b"{" * 40 + b"\\" * 10**6):
        with pytest.raises(RecordError):
            parse_record("k", {"png": b"x", "json": text[: 1 << 20]})
    assert time.process_time() - start < 2
