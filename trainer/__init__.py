"""Guard: this folder is the package `kinodit.trainer` and is importable under that name only."""

if __name__ != "kinodit.trainer":
    raise ImportError("import this package as 'kinodit.trainer', not 'trainer'")
