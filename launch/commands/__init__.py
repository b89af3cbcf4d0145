"""Subcommands of `kinodit`, one module each; `launch/cli.py` imports the one that is asked for."""
