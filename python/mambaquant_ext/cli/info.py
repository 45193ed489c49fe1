"""`mambaquant info`: versions, instruction set, backends, adapters, and a self-test of every kernel."""

from __future__ import annotations

import platform
from typing import Annotated, Any

import torch
import typer

from mambaquant_ext import __version__, _load
from mambaquant_ext.cli.console import print_json, print_line, print_table
from mambaquant_ext.model.adapters import adapter_names
from mambaquant_ext.selftest import self_test


def info(
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what this build is and whether its kernels are right on this machine."""
    build = _load.build_info()
    results = {isa: _tested(isa) for isa in _load.supported_isas()}
    if "cuda" in _load.device_types() and torch.cuda.is_available():
        results["cuda"] = self_test("cuda")
    is_ok = all(status == "ok" for statuses in results.values() for status in statuses.values())
    values: dict[str, Any] = {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **build,
        "isa": _load.current_isa(),
        "isas_supported": _load.supported_isas(),
        "threads": torch.get_num_threads(),
        "adapters": list(adapter_names()),
        "self_test": results,
    }
    if json:
        print_json(values)
    else:
        print_table(
            "mambaquant_ext",
            ["field", "value"],
            [[key, str(value)] for key, value in values.items() if key != "self_test"],
        )
        names = list(next(iter(results.values())))
        print_table(
            "self-test",
            ["kernel", *results],
            [[n, *(results[i][n] for i in results)] for n in names],
        )
    if not is_ok:
        if not json:
            print_line("self-test failed: this build computes wrong results on this machine")
        raise typer.Exit(1)


def _tested(isa: str) -> dict[str, str]:
    with _load.forced_isa(isa):
        return self_test()
