"""Says where the CUDA compiler, its headers and libraries, and CUTLASS are.

    python scripts/cuda_toolchain.py           # shell: eval "$(python scripts/cuda_toolchain.py)"
    python scripts/cuda_toolchain.py --json    # for CMake and other programs

nvcc is the one of --nvcc, else of $CUDA_HOME, else on PATH, else of the wheels of requirements/cuda.txt in the Python
that runs this. CUTLASS is in $MBQ_CUTLASS_DIR, else in its wheel. Exits 1 with one line that says what to do where
something is missing. Needs no package and no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

OLDEST = (12, 8)  # the first with sm_120
INSTALL = "pip install --no-deps -r requirements/cuda.txt"


class ToolchainError(Exception):
    """Something is missing; the message is one line that says what to do."""


@dataclass(frozen=True)
class Toolchain:
    """What a build needs. Every value is text, so that CMake reads it without a thought."""

    nvcc: str
    version: str
    include: str  # cuda_runtime_api.h and the rest
    library: str  # folder of the CUDA runtime
    cudart: str  # the shared runtime, libcudart.so*; "" where the toolkit has none
    link_flags: str  # what nvcc must be told to find its own libraries; "" for a toolkit
    cutlass: str  # cutlass/cutlass.h
    source: str  # where nvcc was found


def wheel_folder(package: str, *below: str) -> Path | None:
    """A folder of an installed package, which is not imported."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # the parent of a dotted name
        return None
    for location in (spec and spec.submodule_search_locations) or []:
        folder = Path(location).joinpath(*below)
        if folder.is_dir():
            return folder
    return None


def find_nvcc(named: str | None) -> tuple[str, str]:
    """The compiler to use and where it was found."""
    if named:
        found = shutil.which(named)
        if not found:
            raise ToolchainError(f"there is no nvcc at {named}: name another, or none")
        return found, "--nvcc"
    home = os.environ.get("CUDA_HOME")
    if home:
        found = shutil.which("nvcc", path=str(Path(home, "bin")))
        if not found:
            raise ToolchainError(
                f"CUDA_HOME is {home}, and there is no bin/nvcc in it: correct or unset it"
            )
        return found, "CUDA_HOME"
    found = shutil.which("nvcc")
    if found:
        return found, "PATH"
    wheel = wheel_folder("nvidia.cu13", "bin")
    found = shutil.which("nvcc", path=str(wheel)) if wheel else None
    if not found:
        raise ToolchainError(
            f"found no nvcc: {INSTALL}, or install a CUDA toolkit and set CUDA_HOME"
        )
    return found, "wheels"


def run(nvcc: str, *arguments: str) -> str:
    """What nvcc prints."""
    try:
        command = [nvcc, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolchainError(
            f"{nvcc} does not run ({error}): set CUDA_HOME to another toolkit"
        ) from error
    return result.stdout + result.stderr


def read_version(nvcc: str) -> str:
    """Release of the compiler, "13.0"."""
    match = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version"))
    if not match:
        raise ToolchainError(f"{nvcc} tells no version: set CUDA_HOME to another toolkit")
    version = (int(match[1]), int(match[2]))
    if version < OLDEST:
        raise ToolchainError(
            f"{nvcc} is of CUDA {match[1]}.{match[2]}, expected {'.'.join(map(str, OLDEST))} or newer: "
            "set CUDA_HOME to such a toolkit"
        )
    return f"{match[1]}.{match[2]}"


@dataclass(frozen=True)
class Compiler:
    """nvcc and the folders in which it looks by itself."""

    nvcc: str
    top: Path  # of its toolkit
    headers: list[Path]
    libraries: list[Path]


def inspect(nvcc: str) -> Compiler:
    """Asks nvcc for its folders, since the one on PATH may be a link or a script that calls the real one."""
    # A link does not know of the nvcc.profile beside its target.
    for candidate in dict.fromkeys([nvcc, str(Path(nvcc).resolve())]):
        plan = run(candidate, "--dryrun", "-x", "cu", "-E", os.devnull)
        variables = dict(re.findall(r"^#\$ (\w+)= *(.*?) *$", plan, re.MULTILINE))
        if "TOP" in variables:
            return Compiler(
                nvcc=candidate,
                top=Path(variables["TOP"]),
                headers=flagged(variables.get("INCLUDES", ""), "-I"),
                libraries=flagged(variables.get("LIBRARIES", ""), "-L"),
            )
    raise ToolchainError(f"{nvcc} does not say where its toolkit is: set CUDA_HOME to the toolkit")


def flagged(words: str, flag: str) -> list[Path]:
    """The folders that a compiler flag names."""
    return [Path(word[len(flag) :]) for word in shlex.split(words) if word.startswith(flag)]


def first_with(folders: list[Path], pattern: str) -> Path | None:
    """The first folder that holds such a file, without links and dots."""
    return next((folder.resolve() for folder in folders if any(folder.glob(pattern))), None)


def require(compiler: Compiler, folders: list[Path], pattern: str) -> Path:
    """The same, for what no build can do without."""
    found = first_with(folders, pattern)
    if not found:
        raise ToolchainError(
            f"{compiler.nvcc} comes without {pattern}: {INSTALL}, or install the whole toolkit"
        )
    return found


def find_cutlass() -> str:
    """The include folder of CUTLASS."""
    named = os.environ.get("MBQ_CUTLASS_DIR")
    if named:
        folder = first_with([Path(named, "include"), Path(named)], "cutlass/cutlass.h")
        if not folder:
            raise ToolchainError(
                f"MBQ_CUTLASS_DIR is {named}, and there is no include/cutlass/cutlass.h in it: correct or unset it"
            )
        return str(folder)
    wheel = wheel_folder("cutlass_library", "source", "include")
    if not wheel:
        raise ToolchainError(f"found no CUTLASS: {INSTALL}, or set MBQ_CUTLASS_DIR to its folder")
    return str(wheel.resolve())


def find_toolchain(named_nvcc: str | None = None) -> Toolchain:
    """All that a build needs, or a ToolchainError."""
    nvcc, source = find_nvcc(named_nvcc)
    version = read_version(nvcc)
    compiler = inspect(nvcc)
    headers = [*compiler.headers, compiler.top / "include"]
    include = require(compiler, headers, "cuda_runtime_api.h")
    require(compiler, [include / "cccl", include], "cub/cub.cuh")
    library = require(compiler, [*compiler.libraries, compiler.top / "lib"], "libcudart*")
    # In the wheels the libraries are in lib, and nvcc looks in lib64.
    finds_itself = library in [folder.resolve() for folder in compiler.libraries]
    return Toolchain(
        nvcc=compiler.nvcc,
        version=version,
        include=str(include),
        library=str(library),
        cudart=str(min(library.glob("libcudart.so*"), default="")),
        link_flags="" if finds_itself else f"-L{library}",
        cutlass=find_cutlass(),
        source=source,
    )


def main() -> int:
    """Prints the toolchain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--nvcc", help="use this compiler")
    arguments = parser.parse_args()
    try:
        found = asdict(find_toolchain(arguments.nvcc))
    except ToolchainError as error:
        print(f"mambaquant_ext: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"export MBQ_CUDA_{name.upper()}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
