"""Refuses per-ISA object files that define weak symbols outside their ISA's namespace.

The linker keeps one copy of a weak symbol (an inline function, a template instance). Were it the copy that
was compiled with AVX-512, a processor without AVX-512 would run it: csrc/cpu/simd/simd.h, NOTE(odr).

Usage: check_symbols.py BUILD_DIR; exits 1 and names each symbol where it finds any.
"""

import re
import subprocess
import sys
from pathlib import Path

ISAS = ("scalar", "avx2", "avx512_vnni")
# Lines of `nm`: address, kind, name. V, W and u are the kinds of which the linker keeps one copy.
SYMBOL = re.compile(r"^[0-9a-f]+ ([VWu]) (.+)$")


def weak_symbols(object_file: Path) -> list[str]:
    """Demangled names of the symbols that other object files may define too."""
    listing = subprocess.run(
        ["nm", "--demangle", "--defined-only", str(object_file)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = (SYMBOL.match(line) for line in listing.splitlines())
    return [match.group(2) for match in found if match]


def is_allowed(symbol: str, isa: str) -> bool:
    """Whether a weak symbol belongs to this ISA alone."""
    return f"mambaquant::cpu::{isa}::" in symbol


def objects_of(build_dir: Path) -> dict[str, list[Path]]:
    """The object files of each ISA in a CMake build folder."""
    folders = {isa: build_dir / "CMakeFiles" / f"mambaquant_{isa}.dir" for isa in ISAS}
    return {isa: sorted(folder.rglob("*.o")) for isa, folder in folders.items()}


def violations(build_dir: Path) -> list[str]:
    """One line for each weak symbol that does not belong."""
    return [
        f"{object_file.relative_to(build_dir)}: {symbol}"
        for isa, objects in objects_of(build_dir).items()
        for object_file in objects
        for symbol in weak_symbols(object_file)
        if not is_allowed(symbol, isa)
    ]


def main() -> int:
    """Checks the build folder that the command line names."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    build_dir = Path(sys.argv[1])
    if not any(objects_of(build_dir).values()):
        print(f"check_symbols: no per-ISA objects under {build_dir}", file=sys.stderr)
        return 2
    found = violations(build_dir)
    print("\n".join(found) if found else "no weak symbol outside its ISA's namespace")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
