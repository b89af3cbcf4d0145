"""Keep credentials out of everything a run writes: resolved configs, events, reports.

A name is judged by its whole words: `WANDB_API_KEY` and `hubToken` are secret, `token_budget`,
`max_tokens` and `num_key_heads` are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

MASK = "***"

_SECRET_ANYWHERE = frozenset(
    {"secret", "secrets", "password", "passwords", "passwd", "passphrase"}
    | {"credential", "credentials", "apikey"}
)
_SECRET_LAST = frozenset({"key", "token", "auth", "authorization", "bearer"})
_SECRET_PAIRS = frozenset(
    (first, second)
    for first in ("api", "access", "auth", "private", "bearer", "session", "hf", "wandb")
    for second in ("key", "keys", "token", "tokens")
)
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_URL_PASSWORD = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/@\s]+@", re.IGNORECASE)
_ASSIGNMENT = re.compile(
    r"""(?P<name>[A-Za-z][\w.-]*)(?P<quote>["']?\s*[=:]\s*)"""
    r"""(?P<value>(?:Bearer\s+|Basic\s+)?(?:"[^"]*"|'[^']*'|[^\s,;&"'{}()\[\]]+))"""
)
_MIN_KNOWN_LENGTH = 8
"""Shorter values of secret variables ("1", "dummy") are words that a log may contain by chance."""


def is_secret_name(name: str) -> bool:
    """Whether a key of a config or an environment names a credential."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words:
        return False
    return (
        words[-1] in _SECRET_LAST
        or not _SECRET_ANYWHERE.isdisjoint(words)
        or any(pair in _SECRET_PAIRS for pair in pairwise(words))
    )


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of `mapping` with the values of secret names replaced by `MASK`.

    Null, booleans and floats stay (none can be a credential), passwords within URLs go.
    """
    return {
        key: _mask(value) if is_secret_name(str(key)) else _redact_value(value)
        for key, value in mapping.items()
    }


def redact_text(text: str, known: Iterable[str] = ()) -> str:
    """Free text without `name=value` of secret names, URL passwords, and `known` secret values."""
    for value in known:
        text = text.replace(value, MASK)
    return _ASSIGNMENT.sub(_mask_assignment, _strip_url(text))


def redact_values(tree: Any, known: Sequence[str]) -> Any:
    """A copy of nested mappings and lists without `known` secret values within strings."""
    if isinstance(tree, Mapping):
        return {key: redact_values(value, known) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redact_values(value, known) for value in tree]
    if isinstance(tree, str):
        for value in known:
            tree = tree.replace(value, MASK)
    return tree


def secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The values of the secret names of an environment, longest first, for `redact_text`."""
    values = {
        value
        for name, value in environment.items()
        if is_secret_name(name) and len(value) >= _MIN_KNOWN_LENGTH
    }
    return tuple(sorted(values, key=lambda value: (-len(value), value)))


def _strip_url(text: str) -> str:
    return _URL_PASSWORD.sub(rf"\g<scheme>{MASK}@", text)


def _mask_assignment(match: re.Match[str]) -> str:
    if not is_secret_name(match["name"]):
        return match[0]
    return f"{match['name']}{match['quote']}{MASK}"


def _mask(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _mask(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mask(item) for item in value]
    if value is None or value == "" or isinstance(value, bool | float):
        return value
    return MASK


def _redact_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact_value(item) for item in value]
    return _strip_url(value) if isinstance(value, str) else value
