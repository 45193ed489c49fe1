"""`mambaquant pack`: the weights of a quantized folder, laid out for one instruction set, in a file to be mapped."""

from __future__ import annotations

from typing import Annotated

import typer

from mambaquant_ext._load import current_isa, supported_isas
from mambaquant_ext.checkpoint import prepack
from mambaquant_ext.cli.console import print_json, print_line
from mambaquant_ext.cli.options import ModelFolder


def _known_isa(name: str | None) -> str | None:
    if name is not None and name not in supported_isas():
        raise typer.BadParameter(f"expected one of {', '.join(supported_isas())}, got {name!r}")
    return name


def pack(
    model: ModelFolder,
    isa: Annotated[
        str | None,
        typer.Option(
            "--isa", callback=_known_isa, help="Instruction set; by default the one in use."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Lay a quantized model's weights out for an instruction set, so that loading it maps a file and copies nothing."""
    path = prepack(model, isa)
    size = path.stat().st_size
    if json:
        print_json({"file": str(path), "isa": isa or current_isa(), "size_bytes": size})
    else:
        print_line(f"{path}: {size / 1e6:.2f} MB for {isa or current_isa()}")
