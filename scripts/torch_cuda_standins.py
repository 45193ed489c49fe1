"""Makes stand-ins for the CUDA libraries that torch's CUDA build loads and this machine lacks.

    pip install --no-deps --target DIR torch==...            # a CUDA build, without its 2 GB of nvidia wheels
    python scripts/torch_cuda_standins.py DIR/torch/lib OUT
    PYTHONPATH=DIR LD_LIBRARY_PATH=SIMULATOR:OUT python -c 'import torch; print(torch.empty(3, device="cuda"))'

A stand-in has the name and the symbols that torch's libraries expect, so the loader is content; a call of a function
says which it was and ends the process. With third_party/cudasim in the place of the CUDA runtime, torch then allocates,
copies and dispatches to our operators as on a GPU; its own kernels come without PTX and raise. Needs cc and readelf.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

NVIDIA = re.compile(r"lib(cu|nv|nccl)")
RUNTIME = "libcudart.so"  # the simulator's
PRESENT = (RUNTIME, "GLIBC", "GCC", "CXXABI")  # versions of symbols that this machine has
SYMBOL = re.compile(r"^ +\d+: \S+ +\S+ +\w+ +(\w+) +\w+ +(\w+) ([\w$.]+)(?:@+(\S+))?", re.MULTILINE)

# Asked when torch starts, so a stand-in of the driver has to answer.
ANSWERS = {
    "cuDevicePrimaryCtxGetState": "int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) "
    "{ *flags = 0; *active = 1; return device; }"
}
PROLOGUE = """#include <stdio.h>
#include <stdlib.h>
static void refuse(const char* name) {{
  fprintf(stderr, "{library}: %s was called, and this is a stand-in\\n", name);
  abort();
}}
"""


@dataclass
class Wanted:
    """What a folder of libraries asks of others."""

    libraries: set[str] = field(default_factory=set)
    symbols: dict[str, str] = field(default_factory=dict)  # name -> version, "" without


def read_libraries(folder: Path) -> Wanted:
    """The NVIDIA libraries that those of a folder need, and the symbols that none of them defines."""
    wanted, defined = Wanted(), set()
    for library in sorted(folder.glob("*.so*")):
        command = ["readelf", "--wide", "--dynamic", "--dyn-syms", str(library)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
        wanted.libraries |= {name for name in needed if NVIDIA.match(name)}
        for binding, section, name, version in SYMBOL.findall(listing):
            if section != "UND":
                defined.add(name)
            elif binding == "GLOBAL":
                wanted.symbols[name] = version
    wanted.libraries = {
        name
        for name in wanted.libraries
        if not name.startswith(RUNTIME) and not (folder / name).exists()
    }
    for name in defined & wanted.symbols.keys():
        del wanted.symbols[name]
    return wanted


def prefix_of(library: str) -> str:
    """What the functions of a library begin with, in lower case."""
    stem = re.sub(r"^lib|[_.].*$", "", library).lower()
    return "cu" if stem == "cuda" else stem


def owner_of(name: str, version: str, libraries: set[str]) -> str | None:
    """The library that should define a symbol: its version says so, or else its name."""
    if version in libraries:
        return version
    if version.startswith(PRESENT):
        return None
    fitting = [library for library in libraries if name.lower().startswith(prefix_of(library))]
    return max(fitting, key=lambda library: len(prefix_of(library)), default=None)


def build(library: str, symbols: dict[str, str], out: Path) -> None:
    """Compiles one stand-in."""
    lines = [PROLOGUE.format(library=library)]
    lines += [
        ANSWERS.get(name, f'void {name}(void) {{ refuse("{name}"); }}') for name in sorted(symbols)
    ]
    by_version = defaultdict(list)
    for name, version in symbols.items():
        by_version[version].append(name)
    by_version.pop("", None)
    nodes = [f"{version} {{ {'; '.join(names)}; }};" for version, names in by_version.items()]
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "library.c"), Path(folder, "versions.map")
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        script.write_text("\n".join(nodes) + "\n", encoding="utf-8")
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(out / library)]
        if nodes:
            command.append(f"-Wl,--version-script={script}")
        subprocess.run([*command, str(source)], check=True)


def main() -> int:
    """Makes the stand-ins of the folders that the command line names."""
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    wanted, out = read_libraries(Path(sys.argv[1])), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    stand_ins: dict[str, dict[str, str]] = {library: {} for library in wanted.libraries}
    for name, version in wanted.symbols.items():
        owner = owner_of(name, version, wanted.libraries)
        if owner:
            stand_ins[owner][name] = version
    for library, symbols in sorted(stand_ins.items()):
        build(library, symbols, out)
        print(f"{library}: {len(symbols)} functions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
