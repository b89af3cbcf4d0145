"""Guard: this folder is the package `kinodit.models` and is importable under that name only."""

if __name__ != "kinodit.models":
    raise ImportError("import this package as 'kinodit.models', not 'models'")
