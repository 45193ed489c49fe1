"""The command `mambaquant` and its subcommands; the only place that turns exceptions into exit codes."""

from __future__ import annotations

import os
import sys

import typer

from mambaquant_ext.cli import evaluate, generate, info, inspect, pack, quantize

FAILURE = 1  # bad arguments end in 2, by typer

app = typer.Typer(
    name="mambaquant",
    help="Quantize Mamba models to int8 with MambaQuant, and run them on hand-written kernels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("quantize")(quantize.quantize)
app.command("pack")(pack.pack)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("info")(info.info)


def main() -> None:
    """Runs the command line. Exit status: 0 success, 1 failure, 2 bad arguments."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come from folders; nothing is downloaded
    if sys.stdout is None or sys.stderr is None:  # closed by whoever started the process
        sys.exit(FAILURE if sys.stderr is None else "mambaquant: expected an open standard output")
    try:
        app()
    except KeyboardInterrupt:
        sys.stderr.write("mambaquant: interrupted\n")
        sys.exit(FAILURE)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        # What a user can cause: a message that names what was expected and what came, and no traceback.
        sys.stderr.write(f"mambaquant: {error}\n")
        sys.exit(FAILURE)
