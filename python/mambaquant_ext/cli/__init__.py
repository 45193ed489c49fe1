"""The command line: `mambaquant quantize | eval | generate | inspect | info`."""

from mambaquant_ext.cli.app import main

__all__ = ["main"]
