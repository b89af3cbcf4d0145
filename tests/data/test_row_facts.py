"""What a row says without a record in between is what the record says."""

from __future__ import annotations

import json
import math
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinodit.data.index import Span, index_row, span_row, spans
from kinodit.data.probe import MediumError, MediumFacts
from kinodit.data.record import Caption, RecordError, RecordMeta, encode_record
from kinodit.data.row_facts import facts_of, usual_facts
from kinodit.data.writer import sample_bytes
from tests.data.shards import image_record, tar_bytes
from tests.data.test_record import BASE

OPENED = MediumFacts(width=5, height=7, num_frames=1)
SAID: dict[str, Any] = {
    "caption": "a hen", "url": "https://example.org/1.jpg", "key": "000", "status": "success",
    "error_message": None, "width": 40, "height": 30, "original_width": 4000,
    "original_height": 3000, "exif": "{}", "sha256": "ab", "similarity": 0.25, "NSFW": "UNLIKELY",
}  # fmt: skip


def sample(members: dict[str, bytes], key: str = "k") -> tuple[memoryview, Span]:
    data = tar_bytes({f"{key}.{name}": payload for name, payload in members.items()})
    view = memoryview(data)
    (span,) = spans(view, whole=True)
    return view, span


def taken(members: dict[str, bytes], key: str = "k") -> tuple[int, ...] | None:
    view, span = sample(members, key)
    return usual_facts(key, span.members, view)


def row(members: dict[str, bytes], key: str) -> tuple[int, ...] | str:
    view, span = sample(members, key)
    try:
        return span_row(view, span, 9, lambda extension, data: OPENED)
    except (RecordError, MediumError) as error:
        return f"{type(error).__name__}: {error}"


def assert_rows_are_those_of_records(members: dict[str, bytes], key: str = "k") -> None:
    found = row(members, key)
    with patch("kinodit.data.index.usual_facts", return_value=None):
        assert row(members, key) == found


def image(document: object, **members: bytes) -> dict[str, bytes]:
    return {"jpg": b"picture", "json": json.dumps(document).encode(), **members}


@pytest.mark.parametrize(
    ("members", "facts"),
    [
        (image(SAID), (1, 30, 40, 0, 0, 5, 1, 0)),
        (image(SAID, txt=b" a fox \n"), (1, 30, 40, 0, 0, 5, 1, 0)),
        (image(SAID, txt="ein Füchslein".encode(), cls=b"1"), (1, 30, 40, 0, 0, 13, 1, 0)),
        (image(SAID, txt=b" \n"), (1, 30, 40, 0, 0, 0, 1, 0)),
        (image({**SAID, "caption": None, "captions": ["", "hens"]}), (1, 30, 40, 0, 0, 4, 1, 0)),
        (image({**SAID, "caption": "\U0001f98a" * 70_000}), (1, 30, 40, 0, 0, 65_535, 1, 0)),
        (image({**SAID, "tags": [["a"]] * 15, "n": 10**400}), (1, 30, 40, 0, 0, 5, 1, 0)),
        (image({**SAID, "b": "[" * 40}), (1, 30, 40, 0, 0, 5, 1, 0)),
        # Nobody reads the caption beside a record of ours.
        (image(BASE, txt=b"\xff"), (0, 4, 4, 0, 0, 0, 1, 0)),
    ],
)
def test_usual_samples_need_no_record(members: dict[str, bytes], facts: tuple[int, ...]) -> None:
    with patch("kinodit.data.index.read_meta", side_effect=AssertionError):
        assert row(members, "k")[2:] == (*facts, 9)
    assert_rows_are_those_of_records(members)


def test_own_records_need_their_json_alone() -> None:
    record = image_record(0, fps=24000 / 1001, duration_s=0.375, has_audio=True)
    data = memoryview(sample_bytes(encode_record(record)))
    (span,) = spans(data, whole=False)
    found = span_row(data, span, 9, lambda extension, data: OPENED)
    assert found == index_row(record.meta, 0, data)._replace(crc32=9)
    assert found[5:10] == (23_976, 375, len("colour number 0"), 1, 1)
    assert usual_facts("k", span.members, data) == facts_of(record.meta)


@pytest.mark.parametrize(
    "members",
    [
        {"jpg": b"p"},
        {"jpg": b"p", "txt": b"a"},
        {"txt": b"a", "json": json.dumps(SAID).encode()},
        image(SAID, png=b"q"),
        image(SAID, ref0=b"r"),
        image(SAID, **{"ref0.jpg": b"r"}),
        image(SAID, **{"latent.safetensors": b"t"}),
        image(SAID, pkl=b"x"),
        image(SAID, mp4=b"x"),
        {"mp4": b"v", "json": json.dumps(SAID).encode()},
        {"mp4": b"v", "json": json.dumps(BASE).encode()},
        {"latent.safetensors": b"t", "json": json.dumps(BASE).encode()},
        image({**BASE, "references": ["a"]}),
        image({**BASE, "references": ["a"]}, **{"ref0.jpg": b"r"}),
        image({**BASE, "width": 0}),
        image({**BASE, "colour": "red"}),
        image({**SAID, "schema": 2}),
        {"jpg": b"p", "json": json.dumps(SAID).replace('"url"', '"sch\\u0065ma"').encode()},
        image({**SAID, "status": "failed_to_download", "error_message": "404"}),
        image({**SAID, "status": None}),
        image({**SAID, "width": 0}),
        image({**SAID, "width": True}),
        image({**SAID, "width": 40.0}),
        image({**SAID, "height": 16_385}),
        image({**SAID, "height": -1}),
        image({name: value for name, value in SAID.items() if name != "original_width"}),
        image([SAID]),
        image(None),
        image({**SAID, "n": math.nan}),
        image(SAID, txt=b"\xff"),
        image(SAID, txt=bytes((1 << 20) + 1)),
        image({**SAID, "a": "x" * (1 << 20)}),
        *(
            {"jpg": b"p", "json": json.dumps(SAID).encode()[:-1] + b', "a": %s}' % value}
            for value in (
                b"1e400", b"NaN", b"-Infinity", b'"\\ud800"', b'"\xed\xa0\x80"', b'"\xff"', b"01",
                b'"\x01"', b'"\\x"', b"1" * 5000, b"[" * 32 + b"]" * 32, b"[" * 33 + b"]" * 33,
                b"[" * 5000 + b"]" * 5000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"[1,]", b"1} {",
                b"[" + b"[], " * 40 + b"1]",
            )
        ),
        *(
            {"jpg": b"p", "json": json.dumps(SAID).encode(encoding)}
            for encoding in ("utf-8-sig", "utf-16", "utf-32-le")
        ),
    ],
)  # fmt: skip
def test_all_else_is_left_to_the_record(members: dict[str, bytes]) -> None:
    assert taken(members) is None
    assert_rows_are_those_of_records(members)


@pytest.mark.parametrize("key", ["K", "\u00e4", "d/k", "k" * 129])
def test_no_key_is_taken_that_no_record_may_have(key: str) -> None:
    view, span = sample(image(SAID))
    assert usual_facts(key, span.members, view) is None
    assert usual_facts("k", span.members, view) is not None


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(
    changes=st.dictionaries(
        st.sampled_from([*SAID, "captions", "text", "TEXT", "lang", "schema", "new"]),
        anything | st.integers(0, 20_000) | st.lists(st.fixed_dictionaries({"text": st.text()})),
        max_size=4,
    ),
    without=st.sets(st.sampled_from(list(SAID)), max_size=2),
    members=st.dictionaries(
        st.sampled_from(["txt", "cls", "png", "mp4", "ref0.jpg", "x.safetensors"]),
        st.binary(max_size=4) | st.text().map(str.encode),
        max_size=2,
    ),
    is_ascii=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_rows_are_those_of_records(
    changes: dict[str, object], without: set[str], members: dict[str, bytes], is_ascii: bool
) -> None:
    document = {name: value for name, value in SAID.items() if name not in without} | changes
    payload = json.dumps(document, ensure_ascii=is_ascii).encode(errors="surrogatepass")
    assert_rows_are_those_of_records({"jpg": b"p", "json": payload, **members})


@given(place=st.integers(0, len(json.dumps(SAID)) - 1), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_damaged_json_is_judged_alike(place: int, value: int) -> None:
    payload = bytearray(json.dumps(SAID).encode())
    payload[place] = value
    assert_rows_are_those_of_records({"jpg": b"p", "json": bytes(payload)})


def test_a_caption_is_counted_and_no_more_than_its_column_holds() -> None:
    meta = RecordMeta("k", "audio", captions=(Caption("a" * 70_000), Caption("b")))
    assert facts_of(meta) == (0, 0, 0, 0, 0, 65_535, 2, 0)
