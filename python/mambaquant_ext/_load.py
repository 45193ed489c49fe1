"""Loads the compiled extension and answers what it was built for and runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_C.so")
_REINSTALL = (
    "reinstall it in its source folder with "
    "`pip install --no-build-isolation --force-reinstall --no-deps .`"
)

try:
    torch.ops.load_library(_LIBRARY)
except OSError as error:
    raise ImportError(
        f"mambaquant_ext: cannot load the compiled extension with torch {torch.__version__} "
        f"({error.__cause__ or error}). It is built against one torch version: {_REINSTALL}."
    ) from error

_build = torch.ops.mambaquant_build
ISA_VARIABLE = "MAMBAQUANT_CPU_ISA"


def _check_torch_version() -> None:
    built, running = _build.torch_version(), torch.__version__
    if built.split("+")[0].split(".")[:2] != running.split("+")[0].split(".")[:2]:
        raise ImportError(
            f"mambaquant_ext: built against torch {built}, but torch {running} is installed; "
            f"{_REINSTALL}."
        )


def _names(joined: str) -> list[str]:
    return joined.split(", ")


def built_isas() -> list[str]:
    """Instruction sets that this build has kernels for, slowest first."""
    return _names(_build.built_isas())


def supported_isas() -> list[str]:
    """Instruction sets that this build and this processor can run, slowest first."""
    return _names(_build.supported_isas())


def current_isa() -> str:
    """The instruction set that the CPU kernels run on now."""
    return str(_build.current_isa())


def force_isa(name: str) -> None:
    """Makes every CPU kernel of this process run on the instruction set `name`.

    Weights that were packed before keep their layout, which the kernels of another instruction set
    refuse: force first, then load models.

    Args:
        name: "scalar", "avx2" or "avx512_vnni".

    Raises:
        ValueError: no such instruction set, or this processor or build lacks it.
    """
    _build.force_isa(name)


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """`force_isa` for the length of a with-block.

    Raises:
        ValueError: as force_isa.
    """
    previous = current_isa()
    force_isa(name)
    try:
        yield
    finally:
        force_isa(previous)


def _apply_environment() -> None:
    name = os.environ.get(ISA_VARIABLE)
    if not name:
        return
    try:
        force_isa(name)
    except ValueError as error:
        raise ImportError(f"{ISA_VARIABLE}={name}: {error}") from error


_check_torch_version()
_apply_environment()
