"""Guard: this folder is the package `kinodit.launch` and is importable under that name only."""

if __name__ != "kinodit.launch":
    raise ImportError("import this package as 'kinodit.launch', not 'launch'")
