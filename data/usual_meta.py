"""`KEY.json` parsed and checked in one pass, by msgspec: every sample that is read goes through it.

What does not pass here may still be right, in a way that is not usual; `kinodit.data.meta` judges,
and names what is wrong.
"""

from __future__ import annotations

import re

import msgspec

from kinodit.data.meta import SCHEMA, RecordMeta

_USUAL = msgspec.json.Decoder(RecordMeta)
_OWN_SCHEMA = b',"schema":%d,' % SCHEMA
"""As it is written here: fields by name, no blanks. Within a text its quotes are escaped."""
_SCHEMA = re.compile(rb'"schema"\s*:\s*%d\s*[,}]' % SCHEMA)
"""A field of that name, or of one that ends so: then there is a backslash before it."""
_BACKSLASH = ord("\\")


def usual_meta(payload: bytes) -> RecordMeta | None:
    """What `parse_meta` makes of the JSON `payload` of a sample, if it is as it should be.

    None if it is not, or is in a way that msgspec does not take (UTF-16, say), or has no id.
    """
    try:
        said = _USUAL.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    # msgspec takes documents without a schema, which are not ours.
    if _OWN_SCHEMA not in payload:
        found = _SCHEMA.search(payload)
        if found is None or payload[found.start() - 1] == _BACKSLASH:
            return None
    return None if "schema" in said.scores else said
