"""Which cases of a long table the default run has."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """All cases, those that are not `chosen` marked as slow. A tuple is one for several names."""
    every: Collection[Any] = list(cases)
    unknown = [case for case in chosen if case not in every]
    assert not unknown, f"no case of the table: {unknown}"
    values = ((case, case if isinstance(case, tuple) else (case,)) for case in every)
    return [
        pytest.param(*value, marks=[] if case in chosen else [pytest.mark.slow])
        for case, value in values
    ]
