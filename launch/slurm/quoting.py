"""The gates through which every value enters a batch script.

What is rendered ends up in three grammars, and each has its own gate, so that no value can become
a directive, a command or a second line: `#SBATCH` values pass an allow-list, words of the script
are shell-quoted, and control characters are refused everywhere.
"""

from __future__ import annotations

import re
import shlex
import unicodedata

from kinodit.models.errors import UserError

_DIRECTIVE = re.compile(r"[A-Za-z0-9_.,:/%@+&|()\[\]*=-]+")
_OPTION = re.compile(rf"--[a-z][a-z-]*(={_DIRECTIVE.pattern})?")


class SlurmError(UserError):
    """A value that may not stand in a batch script, an unknown cluster, a scheduler's refusal."""


def one_line(value: object) -> str:
    """`value` unchanged, if it can stand on one line and reads as what it is.

    Raises:
        SlurmError: it holds a control or format character, which could end the line it stands on
            or make it read as something else.
    """
    text = str(value)
    for character in text:
        if unicodedata.category(character) in {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}:
            raise SlurmError(
                f"{text!r} holds the character {character!r}, which may not stand in a script"
            )
    return text


def quote(value: object) -> str:
    """`value` as one shell word; refuses what `one_line` refuses."""
    word = shlex.quote(one_line(value))
    # "A==b" assigns "=b", and reads as a comparison.
    return f"'{word}'" if word.startswith("=") else word


def directive(value: object) -> str:
    """`value` as the value of a `#SBATCH` line.

    Raises:
        SlurmError: it holds anything but letters, digits and the punctuation sbatch knows.
    """
    text = str(value)
    if not _DIRECTIVE.fullmatch(text):
        raise SlurmError(
            f"{text!r} may not stand in an #SBATCH line: letters, digits and _.,:/%@+&|()[]*=- only"
        )
    return text


def option(value: object) -> str:
    """`value` as a whole option of sbatch's, `--name` or `--name=value`, in a `#SBATCH` line.

    Raises:
        SlurmError: it is anything else.
    """
    text = str(value)
    if not _OPTION.fullmatch(text):
        raise SlurmError(f"{text!r} is not an option of the form --name or --name=value")
    return text
