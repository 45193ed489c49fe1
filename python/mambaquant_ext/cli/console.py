"""What the subcommands share: progress bars on stderr, results on stdout as a table or as JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

LOG_WIDTH = 120


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps other libraries' notices (missing CUDA kernels, progress bars) out of the output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def progress_bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; the yielded function sets how many of `total` are done."""
    with tqdm(total=total, desc=what, unit=unit, file=sys.stderr, leave=False) as bar:
        yield lambda done: (bar.update(done - bar.n), None)[1]


def print_json(values: Any) -> None:
    """Writes one JSON document to stdout."""
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Writes a table to stdout."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    # A pipe or a log has no width; a terminal does, and rich fits the table into it.
    width = None if sys.stdout.isatty() else LOG_WIDTH
    Console(file=sys.stdout, width=width).print(table)


def print_line(text: str) -> None:
    """Writes a line to stdout."""
    sys.stdout.write(text + "\n")
