"""The command line; see `fastrerank.cli.commands`."""

from fastrerank.cli.commands import app, main

__all__ = ["app", "main"]
