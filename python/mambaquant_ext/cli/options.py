"""Arguments and options that subcommands share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from mambaquant_ext.cli.data import DEFAULT_WINDOW
from mambaquant_ext.config import PRESETS


def _known_recipe(name: str) -> str:
    if name not in PRESETS:
        raise typer.BadParameter(f"expected one of {', '.join(PRESETS)}, got {name!r}")
    return name


def count_help(what: str, defaults: Mapping[str, int]) -> str:
    """The help of an option whose default depends on the kind of data.

    Args:
        what: the option counts.
        defaults: by unit of the data.
    """
    values = " or ".join(f"{count} {unit}s" for unit, count in defaults.items())
    return f"{what}; by default {values}."


ModelFolder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Model folder.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", callback=_known_recipe, help=f"One of {', '.join(PRESETS)}.")
]
WindowLength = Annotated[
    int | None,
    typer.Option(
        "--window", min=2, help=f"Tokens per window of a text; by default {DEFAULT_WINDOW}."
    ),
]
