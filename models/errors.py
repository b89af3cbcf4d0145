"""Errors that are the user's to fix: the command line shows their message without a traceback."""


class UserError(ValueError):
    """What was asked cannot be done; the message says what was found and what to change.

    exit_code: of the command that it ends
    """

    exit_code = 2


class ConfigError(UserError):
    """A recipe or override that does not fit the schema, or fields that contradict each other."""


class MissingExtraError(UserError):
    """An optional dependency is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed: pip install 'kinodit[{extra}]'"
        )
