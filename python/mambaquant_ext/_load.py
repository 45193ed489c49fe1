"""Loads the compiled extension and answers what it was built for and runs on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch


def _refuse(message: str) -> NoReturn:
    """Fails the import of the package, in the command `mambaquant` with one line instead of a traceback.

    The command cannot catch it: Python imports the package before any line of the command runs.
    """
    module_name = __name__.partition(".")[0]
    is_command = Path(sys.argv[0]).stem == "mambaquant" or (
        sys.argv[0] == "-m"
        and module_name in sys.orig_argv  # `python -m mambaquant_ext`, not yet located
    )
    if is_command:
        sys.stderr.write(f"mambaquant: {message}\n")
        sys.exit(1)
    raise ImportError(message)


try:
    from mambaquant_ext import _C
except ImportError as error:
    _refuse(
        f"mambaquant_ext: cannot load the compiled extension with torch {torch.__version__} ({error}). "
        "It is built against one torch version: reinstall it with "
        "`pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder."
    )

ISA_VARIABLE = "MAMBAQUANT_CPU_ISA"


def _check_torch_version() -> None:
    built, running = _C.torch_version.split("+")[0], torch.__version__.split("+")[0]
    if built.split(".")[:2] != running.split(".")[:2]:
        _refuse(
            f"mambaquant_ext: built against torch {_C.torch_version}, but torch {torch.__version__} is "
            "installed; reinstall it with `pip install --no-build-isolation --force-reinstall --no-deps .`"
        )


def build_info() -> dict[str, str | bool]:
    """What the extension was built with: torch, compiler, whether CUDA kernels are in it."""
    return {"built_with_torch": _C.torch_version, "compiler": _C.compiler, "cuda": _C.has_cuda}


def device_types() -> list[str]:
    """Types of the devices that this build has kernels for: "cpu", and "cuda" where it has them."""
    return ["cpu", "cuda"] if _C.has_cuda else ["cpu"]


def hadamard_base(n: int) -> list[list[int]]:
    """The base matrix of the Hadamard transform of size n: rows of +1 and -1.

    Raises:
        ValueError: an unsupported n (the message names the nearest).
    """
    return _C.hadamard_base(n)


def supported_hadamard_sizes() -> tuple[int, ...]:
    """Every size that the Hadamard kernels support, rising."""
    return tuple(_C.supported_hadamard_sizes())


def built_isas() -> list[str]:
    """Instruction sets that this build has kernels for, slowest first."""
    return list(_C.built_isas())


def supported_isas() -> list[str]:
    """Instruction sets that this build and this processor can run, slowest first."""
    return list(_C.supported_isas())


def current_isa() -> str:
    """The instruction set that the CPU kernels run on now."""
    return str(_C.current_isa())


def force_isa(name: str) -> None:
    """Makes every CPU kernel of this process run on the instruction set `name`.

    Weights that were packed before keep their layout, which the kernels of another instruction set refuse:
    force first, then load models.

    Args:
        name: "scalar", "avx2" or "avx512_vnni".

    Raises:
        ValueError: no such instruction set, or this processor or build lacks it.
    """
    _C.force_isa(name)


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


class GemmPacking(NamedTuple):
    """How the kernels of an instruction set want a matrix.

    Attributes:
        isa: name of the instruction set.
        layout: id that pack_gemm_weight gives its result.
        version: of the order of the bytes; another release's may differ.
    """

    isa: str
    layout: int
    version: int


def gemm_packing(isa: str | None = None) -> GemmPacking:
    """How the kernels want a matrix.

    Args:
        isa: name of an instruction set in this build; by default the one in use.
    """
    isa = isa or current_isa()
    return GemmPacking(isa, *_C.gemm_packings()[isa])


def packed_gemm_weight_bytes(n: int, k: int) -> int:
    """Size of a packed matrix (N, K), whatever the instruction set.

    Args:
        n: rows.
        k: columns.
    """
    return _C.packed_gemm_weight_bytes(n, k)


def _apply_environment() -> None:
    name = os.environ.get(ISA_VARIABLE)
    if not name:
        return
    try:
        force_isa(name)
    except ValueError as error:
        _refuse(f"{ISA_VARIABLE}={name}: {error}")


_check_torch_version()
_apply_environment()
