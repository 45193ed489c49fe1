"""What the subcommands share: progress bars on stderr, results on stdout as a table or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps other libraries' notices (missing CUDA kernels, progress bars) out of the output."""
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
    Console(file=sys.stdout).print(table)


def print_line(text: str) -> None:
    """Writes a line to stdout."""
    sys.stdout.write(text + "\n")
