"""The command line, ``uwm VERB``."""

from pipelines.cli.app import main

__all__ = ["main"]
