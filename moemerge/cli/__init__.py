"""The command line: one command is one function call; an error becomes a message and an exit code."""

from moemerge.cli.entry import main

__all__ = ["main"]
