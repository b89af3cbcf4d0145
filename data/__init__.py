"""Guard: this folder is the package `kinodit.data` and is importable under that name only."""

if __name__ != "kinodit.data":
    raise ImportError("import this package as 'kinodit.data', not 'data'")
