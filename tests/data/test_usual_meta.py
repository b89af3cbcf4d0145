"""Records that are parsed in one pass are those that would pass the checks of each field."""

from __future__ import annotations

import json
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinodit.data.meta import KNOWN_FIELDS
from kinodit.data.record import (
    Caption,
    Record,
    RecordMeta,
    encode_record,
    parse_meta,
    parse_record,
)
from kinodit.data.usual_meta import usual_meta
from tests.data.test_record import BASE, text

FULL = RecordMeta(
    id="clip", modality="video", width=64, height=32, fps=24000 / 1001, num_frames=9,
    duration_s=0.375, has_audio=True, sample_rate=16_000, scores={"motion": -1e-300, "é": 3.0},
    captions=(Caption("ein Fuchs 🦊", "de", "hand", 0.5), Caption("second")), extra={"a": ""},
    source="s", licence="CC0-1.0", sha256={"mp4": "ab"}, references=(),
)  # fmt: skip

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def test_what_is_written_here_is_taken_and_is_the_same() -> None:
    sample = encode_record(Record("k", FULL, {"mp4": b"media"}))
    payload = sample["json"]
    assert isinstance(payload, bytes)
    assert usual_meta(payload) == FULL == parse_meta("k", json.loads(payload))
    least = b'{"schema": 1, "id": "k", "modality": "audio"}'
    assert usual_meta(least) == RecordMeta("k", "audio") == parse_meta("x", json.loads(least))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scores": {"schema": 1.0}},
        {"scores": {"a": 0.5, "schema": 1, "z": 0.5}},
        {"scores": {'my "schema': 1}},
        {"extra": {"schema": "1"}},
        {"source": ',"schema":1,', "licence": "schema"},
        {"captions": [{"text": '{"schema":1}'}]},
    ],
)
def test_documents_without_a_schema_are_not_taken(changes: dict[str, object]) -> None:
    """They are of other tools, whatever they say elsewhere."""
    document = {"id": "x", "modality": "image", **changes}
    for separators in ((",", ":"), (", ", ": ")):
        assert usual_meta(json.dumps(document, separators=separators).encode()) is None
        ours = json.dumps({"schema": 1, **document}, separators=separators).encode()
        taken = usual_meta(ours)
        assert taken is None or taken == parse_meta("k", json.loads(ours))
        assert taken is not None or "scores" in changes


def test_records_are_the_same_without_it() -> None:
    members = {"mp4": b"m", "json": json.dumps({**BASE, "modality": "video"}).encode()}
    found = parse_record("k", members)
    with patch("kinodit.data.record.usual_meta", return_value=None):
        assert parse_record("k", members) == found


@given(
    name=st.sampled_from([*sorted(KNOWN_FIELDS), "unknown"]),
    value=anything | st.lists(st.fixed_dictionaries({"text": text}, optional={"weight": anything})),
    is_ascii=st.booleans(),
)
def test_what_is_taken_passes_the_checks_of_each_field(
    name: str, value: object, is_ascii: bool
) -> None:
    document = json.dumps({**BASE, name: value}, ensure_ascii=is_ascii)
    payload = document.encode(errors="surrogatepass")
    found = usual_meta(payload)
    if found is not None:
        assert found == parse_meta("k", json.loads(payload.decode()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 16_385), ("height", -1), ("fps", 1000.5), ("fps", -0.1), ("num_frames", -1),
        ("num_frames", 10_000_001), ("duration_s", 4e6 + 1), ("sample_rate", 1_000_001),
        ("references", ["a"] * 9), ("captions", [{"text": "a", "author": "b"}]),
        ("captions", [{"text": "a", "weight": -0.5}]), ("captions", [{"lang": "en"}]),
        ("modality", "text"), ("schema", 2), ("colour", "red"), ("has_audio", 1), ("width", 4.5),
    ],
)  # fmt: skip
def test_what_breaks_a_bound_is_left_to_the_checks(name: str, value: object) -> None:
    assert usual_meta(json.dumps({**BASE, name: value}).encode()) is None


@pytest.mark.parametrize("value", [b'"\\ud800"', b'"\xed\xa0\x80"', b"1e400", b"NaN", b"-Infinity"])
@pytest.mark.parametrize("name", ["source", "fps", "width", "id", "captions"])
def test_what_json_or_unicode_does_not_have_is_left_to_the_checks(name: str, value: bytes) -> None:
    start = json.dumps(BASE).encode()[:-1]
    assert usual_meta(start + b', "%s": %s}' % (name.encode(), value)) is None
    for kind in (b'"scores": {"a": %s}}', b'"extra": {"a": %s}}', b'"captions": [{"text": %s}]}'):
        assert usual_meta(start + b", " + kind % value) is None


def test_depth_ends_nothing() -> None:
    start = json.dumps(BASE).encode()[:-1]
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        deep = start + b', "extra": {"a": ' + opening * 100_000 + b"1" + closing * 100_000 + b"}}"
        assert usual_meta(deep) is None
