"""Filter expressions over the fields of records: a small grammar, parsed here, never evaluated.

    expression := conjunction ("or" conjunction)*
    conjunction := negation ("and" negation)*
    negation := "not" negation | "(" expression ")" | comparison
    comparison := operand (OPERATOR operand)+ | operand ["not"] "in" "[" constant, ... "]" | NAME
    OPERATOR := < <= > >= == !=
    operand := NAME | number | string | "true" | "false"

A comparison chains as in `256 <= height < 720`. A field that a record does not have makes every
comparison with it false. A bare name is a field that is true or false.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from kinodit.models.errors import ConfigError

Columns = Mapping[str, NDArray[Any]]
"""Field -> [n] float64 with NaN for missing, or [n] str objects with None for missing."""
Mask = NDArray[np.bool_]

INDEX_FIELDS = (
    "modality", "has_audio", "num_frames", "duration_s", "fps", "height", "width", "short_side",
    "pixels", "aspect", "caption_chars",
)  # fmt: skip
ALIASES = {
    "duration": "duration_s", "resolution": "short_side", "language": "lang",
    "aesthetic": "scores.aesthetic", "motion": "scores.motion", "ocr": "scores.ocr",
    "clarity": "scores.clarity",
}  # fmt: skip
RECORD_FIELDS = ("lang", "source", "licence")
TEXT_FIELDS = ("modality", *RECORD_FIELDS)

MAX_CHARS = 4096
MAX_DEPTH = 32
_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<text>'[^'\n]*'|\"[^\"\n]*\")"
    r"|(?P<name>[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)?)"
    r"|(?P<sign><=|>=|==|!=|<|>|\(|\)|\[|\]|,))"
)
_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_WORDS = ("and", "or", "not", "in", "true", "false")


@dataclass(frozen=True)
class Filter:
    """A parsed expression. `fields` are those that it needs, in the order of the text."""

    text: str
    fields: tuple[str, ...]
    _mask: Callable[[Columns, int], Mask]

    @property
    def needs_records(self) -> bool:
        """Whether fields are asked for that the index does not have."""
        return any(name not in INDEX_FIELDS for name in self.fields)

    def mask(self, columns: Columns, count: int) -> Mask:
        """[count] which samples pass."""
        return self._mask(columns, count)


def parse(text: str) -> Filter:
    """The filter that `text` says.

    Raises:
        ConfigError: it does not follow the grammar, or names no field; says where.
    """
    parser = _Parser(text)
    mask = parser.whole()
    return Filter(text, tuple(dict.fromkeys(parser.fields)), mask)


@dataclass(frozen=True)
class _Operand:
    """A column or a constant. `is_text`: of strings."""

    name: str | None
    value: Any
    is_text: bool

    def of(self, columns: Columns) -> Any:
        return self.value if self.name is None else columns[self.name]


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self.fields: list[str] = []
        self._depth = 0
        self._tokens: list[tuple[str, str, int]] = []
        self._at = 0
        if len(text) > MAX_CHARS:
            raise ConfigError(f"a filter has {len(text)} characters; {MAX_CHARS} are allowed")
        place = 0
        while text[place:].strip():
            found = _TOKEN.match(text, place)
            if found is None:
                self._refuse(place, "a field, a number, a quoted text or an operator")
            kind = str(found.lastgroup)
            self._tokens.append((kind, found.group(kind), found.start(kind)))
            place = found.end()

    def whole(self) -> Callable[[Columns, int], Mask]:
        mask = self._either()
        if self._at < len(self._tokens):
            self._refuse(self._tokens[self._at][2], "'and', 'or' or the end")
        return mask

    def _either(self) -> Callable[[Columns, int], Mask]:
        parts = [self._both()]
        while self._take("or"):
            parts.append(self._both())
        return lambda columns, n: np.logical_or.reduce([part(columns, n) for part in parts])

    def _both(self) -> Callable[[Columns, int], Mask]:
        parts = [self._negation()]
        while self._take("and"):
            parts.append(self._negation())
        return lambda columns, n: np.logical_and.reduce([part(columns, n) for part in parts])

    def _negation(self) -> Callable[[Columns, int], Mask]:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConfigError(f"a filter is nested more than {MAX_DEPTH} deep: {self._text[:80]}")
        if self._take("not"):
            inner = self._negation()
            mask: Callable[[Columns, int], Mask] = lambda columns, n: ~inner(columns, n)  # noqa: E731
        elif self._take("("):
            mask = self._either()
            self._need(")")
        else:
            mask = self._comparison()
        self._depth -= 1
        return mask

    def _comparison(self) -> Callable[[Columns, int], Mask]:
        first = self._operand()
        negated = self._take("not")
        if negated or self._peek() == "in":
            self._need("in")
            return self._membership(first, negated)
        links: list[tuple[str, _Operand]] = []
        while self._peek() in _OPERATORS:
            sign = self._next()[1]
            place = self._place()
            links.append((sign, self._operand()))
            if links[-1][1].is_text != first.is_text or (
                first.is_text and sign not in ("==", "!=")
            ):
                self._refuse(place, "values of one kind (texts have == and != only)")
        if not links:
            if first.name is None or first.is_text:
                self._refuse(self._place(), "a comparison")
            return lambda columns, n: columns[str(first.name)] == 1
        chain = [first, *(operand for _, operand in links)]

        def mask(columns: Columns, count: int) -> Mask:
            held = np.ones(count, dtype=np.bool_)
            for left, (sign, right) in zip(chain, links, strict=False):
                held &= _compare(sign, left.of(columns), right.of(columns), count)
            return held

        return mask

    def _membership(self, operand: _Operand, negated: bool) -> Callable[[Columns, int], Mask]:
        self._need("[")
        values = [self._operand()]
        while self._take(","):
            values.append(self._operand())
        self._need("]")
        if any(v.name is not None or v.is_text != operand.is_text for v in values):
            self._refuse(self._place(), "a list of constants of the field's kind")
        sign = "!=" if negated else "=="
        combine = np.logical_and if negated else np.logical_or

        def mask(columns: Columns, count: int) -> Mask:
            column = operand.of(columns)
            found: Mask = combine.reduce([_compare(sign, column, v.value, count) for v in values])
            return found

        return mask

    def _operand(self) -> _Operand:
        place = self._place()
        kind, word, _ = self._next()
        if kind == "number":
            return _Operand(None, float(word), False)
        if kind == "text":
            return _Operand(None, word[1:-1], True)
        if word in ("true", "false"):
            return _Operand(None, float(word == "true"), False)
        if kind != "name" or word in _WORDS:
            self._refuse(place, "a field or a constant")
        name = ALIASES.get(word, word)
        if name not in (*INDEX_FIELDS, *RECORD_FIELDS) and not name.startswith(
            ("scores.", "extra.")
        ):
            known = ", ".join((*INDEX_FIELDS, *RECORD_FIELDS, *ALIASES))
            raise ConfigError(
                f"a filter names {word!r}, which is no field; there is {known}, and scores.NAME "
                "and extra.NAME of the records"
            )
        self.fields.append(name)
        return _Operand(name, None, name in TEXT_FIELDS or name.startswith("extra."))

    def _peek(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _place(self) -> int:
        return self._tokens[self._at][2] if self._at < len(self._tokens) else len(self._text)

    def _next(self) -> tuple[str, str, int]:
        if self._at == len(self._tokens):
            self._refuse(len(self._text), "a field or a constant")
        self._at += 1
        return self._tokens[self._at - 1]

    def _take(self, word: str) -> bool:
        found = self._peek() == word
        self._at += found
        return found

    def _need(self, word: str) -> None:
        if not self._take(word):
            self._refuse(self._place(), repr(word))

    def _refuse(self, place: int, expected: str) -> NoReturn:
        found = self._text[place : place + 20] or "the end"
        raise ConfigError(
            f"the filter {self._text[:200]!r} cannot be read at character {place + 1} ({found!r}): "
            f"expected {expected}"
        )


def _compare(sign: str, left: Any, right: Any, count: int) -> Mask:
    """[count] left OPERATOR right; false where either is missing."""
    there = np.ones(count, dtype=np.bool_)
    for side in (left, right):
        if isinstance(side, np.ndarray):
            is_text = side.dtype == object
            there &= np.array([x is not None for x in side]) if is_text else ~np.isnan(side)
    found: Mask = np.broadcast_to(_OPERATORS[sign](left, right), (count,)).astype(np.bool_) & there
    return found
