"""The command line, ``uwm VERB``."""

from pipelines.cli.main import main

__all__ = ["main"]
