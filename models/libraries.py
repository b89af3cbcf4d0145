"""Optional libraries, imported when something asks for them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kinodit.models.errors import MissingExtraError


@contextmanager
def without_warnings() -> Iterator[None]:
    """Leave out what libraries log below errors: torchao speaks of kernels of other devices."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """The module named `module`, which comes with kinodit[`extra`] and which `purpose` needs.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        with without_warnings():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        raise MissingExtraError(library, extra, purpose) from error
