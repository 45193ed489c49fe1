"""Refuses a Python extension module with symbols that nothing defines.

Shared modules link with whatever is missing; the loader complains, on a machine that has all libraries. This check
needs only those that the module names itself, so a CUDA module is checked where no GPU and no CUDA library is.

Usage: check_link.py MODULE LIBRARY...; exits 1 and names each symbol that no LIBRARY defines. The interpreter's
symbols (Py*) and versioned ones, which the linker took from a library of the system or from the CUDA runtime, pass.
"""

import subprocess
import sys
from pathlib import Path

INTERPRETER = ("Py", "_Py")


def symbols(library: Path, which: str) -> set[str]:
    """Dynamic symbols, "name" or "name@version"."""
    listing = subprocess.run(
        ["nm", "--dynamic", "--format=posix", which, str(library)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    fields = (line.split() for line in listing.splitlines())
    # Weak symbols (w, v) may stay undefined.
    return {name for name, kind, *_ in fields if kind not in "wv"}


def undefined(module: Path, libraries: list[Path]) -> list[str]:
    """Names of the module's symbols that none of the libraries defines."""
    wanted = {
        name
        for name in symbols(module, "--undefined-only")
        if "@" not in name and not name.startswith(INTERPRETER)
    }
    for library in libraries:
        wanted -= {name.split("@")[0] for name in symbols(library, "--defined-only")}
    return sorted(wanted)


def main() -> int:
    """Checks the module that the command line names."""
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    module, *libraries = map(Path, sys.argv[1:])
    missing = [path for path in (module, *libraries) if not path.is_file()]
    if missing:
        print(f"check_link: there is no file {missing[0]}", file=sys.stderr)
        return 2
    found = undefined(module, libraries)
    for name in found:
        shown = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
        print(f"{module.name}: nothing defines {shown.strip()}")
    if not found:
        print(f"{module.name}: every symbol is defined")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
