"""Filters say what they mean, and whatever is not in the grammar is refused with its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kinodit.data.expression import MAX_DEPTH, parse
from kinodit.models.errors import ConfigError

NAN = float("nan")
COLUMNS: dict[str, NDArray[Any]] = {
    "height": np.array([256.0, 480.0, 720.0, NAN]),
    "duration_s": np.array([2.0, 5.0, NAN, 30.0]),
    "has_audio": np.array([1.0, 0.0, 1.0, 0.0]),
    "scores.aesthetic": np.array([4.5, NAN, 6.0, 5.0]),
    "lang": np.array(["en", "fr", None, "en"], dtype=object),
    "modality": np.array(["video", "image", "video", "audio"], dtype=object),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("height >= 480", [1, 2]),
        ("256 <= height < 720", [0, 1]),
        ("480<=height", [1, 2]),
        ("height != 480", [0, 2]),
        ("not height == 480", [0, 2, 3]),
        ("aesthetic >= 5", [2, 3]),
        ("scores.aesthetic > 4 and duration < 10", [0]),
        ("aesthetic > 5 or duration > 10", [2, 3]),
        ("has_audio and lang == 'en'", [0]),
        ("not has_audio", [1, 3]),
        ("has_audio == false", [1, 3]),
        ('language != "en"', [1]),
        ("lang in ['en', 'de']", [0, 3]),
        ("lang not in ['en']", [1]),
        ("height in [256, 720]", [0, 2]),
        ("modality == 'video' and (height < 300 or aesthetic > 5)", [0, 2]),
        # 'and' binds before 'or', 'not' before both.
        ("has_audio or height == 480 and duration > 10", [0, 2]),
        ("not has_audio and height == 480", [1]),
        ("duration_s >= 1.5e1", [3]),
        ("duration_s > -1", [0, 1, 3]),
    ],
)
def test_what_an_expression_keeps(text: str, expected: list[int]) -> None:
    found = parse(text)
    assert set(found.fields) <= set(COLUMNS)
    assert np.flatnonzero(found.mask(COLUMNS, 4)).tolist() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "character 1 .'the end'.: expected a field"),
        ("height", None),
        ("height >=", "expected a field or a constant"),
        ("heigth > 3", "names 'heigth', which is no field; there is modality"),
        ("height > 3 width", "character 12 .'width'.: expected 'and', 'or' or the end"),
        ("height > 'tall'", "values of one kind"),
        ("lang < 'en'", "texts have == and != only"),
        ("3", "expected a comparison"),
        ("(height > 3", r"expected '\)'"),
        ("lang in ['en', height]", "constants"),
        ("__import__('os')", "names '__import__'"),
        ("height.__class__ == 3", "names 'height.__class__'"),
        ("height > 3; height", "character 11"),
        ("lambda", "names 'lambda'"),
        ("(" * (MAX_DEPTH + 1) + "height > 3", "nested more than"),
        ("not " * (MAX_DEPTH + 1) + "has_audio", "nested more than"),
        ("height > 3 " + " " * 5000, "4096 are allowed"),
    ],
)
def test_what_is_not_in_the_grammar_is_refused(text: str, message: str | None) -> None:
    if message is None:
        assert parse(text).fields == ("height",)
        return
    with pytest.raises(ConfigError, match=message):
        parse(text)


@settings(deadline=None, max_examples=400)
@given(st.text(alphabet="height lang()[]'\"<>=!andornti.0123_,\\\n", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except ConfigError:
        return
    assert found.mask({name: np.zeros(3) for name in found.fields}, 3).shape == (3,)
