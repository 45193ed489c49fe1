"""What ptxas made of every kernel: registers, shared memory, spills, and the blocks that fit a multiprocessor.

Usage: ptxas_report.py BUILD_DIR [--json FILE]; prints a table. Exits 1 where a register is spilled or a kernel
lacks an architecture, 2 where the folder holds no report. The reports are written by nvcc_with_report.py.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class KernelResources:
    """One kernel on one architecture."""

    source: str
    kernel: str
    architecture: str
    registers: int
    shared_bytes: int  # static; dynamic shared memory is the launch's
    stack_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA programming guide, table of compute capabilities)."""

    threads: int
    blocks: int
    shared_bytes: int  # of which each block takes 1 KiB more than it asks for
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(2048, 32, 167936),
    "sm_86": Multiprocessor(1536, 16, 102400),
    "sm_89": Multiprocessor(1536, 24, 102400),
    "sm_90a": Multiprocessor(2048, 32, 233472),
    "sm_100": Multiprocessor(2048, 32, 233472),
    "sm_120": Multiprocessor(1536, 24, 102400),
}


def parse(text: str, source: str) -> list[KernelResources]:
    """The kernels of one report; names stay mangled."""
    found = []
    name = architecture = None
    stack = spills = 0
    for line in text.splitlines():
        if match := ENTRY.search(line):
            name, architecture = match.groups()
            stack = spills = 0
        elif match := SPILLS.search(line):
            stack, stores, loads = map(int, match.groups())
            spills = stores + loads
        elif (match := USED.search(line)) and name is not None and architecture is not None:
            shared = SHARED.search(line)
            found.append(
                KernelResources(
                    source, name, architecture, int(match.group(1)),
                    int(shared.group(1)) if shared else 0, stack, spills,
                )
            )  # fmt: skip
            name = None
    return found


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled to readable, without namespaces of ours and without the parameter list."""
    done = subprocess.run(
        ["c++filt", *names], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {name: _short(readable) for name, readable in zip(names, done, strict=True)}


def _short(name: str) -> str:
    if "cutlass::device_kernel<" in name:  # its template arguments fill a page
        return "cutlass::device_kernel"
    name = name.removeprefix("void ").replace("mambaquant::cuda::", "").replace("mambaquant::", "")
    name = name.replace("(anonymous namespace)::", "").replace("__nv_bfloat16", "bf16")
    name = re.sub(r"\((?:int|bool|unsigned int|[A-Za-z]\w*)\)(-?\d+)", r"\1", name)
    name = name.replace("__half", "f16").replace("signed char", "int8").replace("float", "f32")
    depth = 0
    for i, c in enumerate(name):  # the parameter list opens outside of template arguments
        depth += {"<": 1, ">": -1}.get(c, 0)
        if c == "(" and depth == 0:
            return name[:i]
    return name


def read_reports(build_dir: Path) -> list[KernelResources]:
    """Every kernel that was compiled under a build folder, by source, kernel and architecture."""
    found = []
    for path in sorted(build_dir.rglob("*.ptxas")):
        source = path.name.removesuffix(".ptxas").removesuffix(".o")
        found += parse(path.read_text(encoding="utf-8"), source)
    readable = demangle(sorted({k.kernel for k in found})) if found else {}
    named = [KernelResources(**{**asdict(k), "kernel": readable[k.kernel]}) for k in found]
    return sorted(named, key=lambda k: (k.source, k.kernel, k.architecture))


def blocks_per_multiprocessor(
    kernel: KernelResources, threads: int, dynamic_shared_bytes: int = 0
) -> int:
    """How many blocks of `threads` threads fit one multiprocessor at once."""
    sm = MULTIPROCESSORS[kernel.architecture]
    warps = -(-threads // 32)
    per_warp = -(-kernel.registers * 32 // 256) * 256  # registers are given in units of 256
    by_registers = sm.registers // per_warp // warps
    by_shared = sm.shared_bytes // (kernel.shared_bytes + dynamic_shared_bytes + 1024)
    return min(sm.blocks, sm.threads // (warps * 32), by_registers, by_shared)


def missing_architectures(kernels: list[KernelResources]) -> dict[str, set[str]]:
    """Kernels that lack one of the architectures of their source's other kernels."""
    by_source: dict[str, set[str]] = {}
    by_kernel: dict[tuple[str, str], set[str]] = {}
    for k in kernels:
        by_source.setdefault(k.source, set()).add(k.architecture)
        by_kernel.setdefault((k.source, k.kernel), set()).add(k.architecture)
    return {
        f"{source}: {kernel}": by_source[source] - got
        for (source, kernel), got in by_kernel.items()
        if by_source[source] - got
    }


def architectures_of(kernels: list[KernelResources]) -> list[str]:
    """Oldest first."""
    return sorted({k.architecture for k in kernels}, key=lambda a: int(a.strip("sm_a")))


def table(kernels: list[KernelResources]) -> list[str]:
    """A line for each kernel: registers on each architecture."""
    architectures = architectures_of(kernels)
    lines = ["| kernel | " + " | ".join(architectures) + " |"]
    lines.append("| --- |" + " ---: |" * len(architectures))
    registers: dict[str, dict[str, int]] = {}
    for k in kernels:
        registers.setdefault(k.kernel, {})[k.architecture] = k.registers
    for kernel, by_architecture in registers.items():
        cells = [str(by_architecture.get(a, "-")) for a in architectures]
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Checks the build folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("build_dir", type=Path)
    parser.add_argument("--json", type=Path, help="also write the kernels here")
    parser.add_argument("--quiet", action="store_true", help="one line in place of the table")
    arguments = parser.parse_args()
    kernels = read_reports(arguments.build_dir)
    if not kernels:
        print(f"ptxas_report: no reports under {arguments.build_dir}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n")
    if not arguments.quiet:
        print("\n".join(table(kernels)))
    spilled = [k for k in kernels if k.spill_bytes]
    missing = missing_architectures(kernels)
    for k in spilled:
        print(f"{k.source}: {k.kernel} spills {k.spill_bytes} bytes on {k.architecture}")
    for kernel, architectures in missing.items():
        print(f"{kernel} lacks {', '.join(sorted(architectures))}")
    names = architectures_of(kernels)
    count = len({(k.source, k.kernel) for k in kernels})
    most = max(k.registers for k in kernels)
    if not spilled and not missing:
        print(f"{count} kernels on {', '.join(names)}: no spills, at most {most} registers")
    return 1 if spilled or missing else 0


if __name__ == "__main__":
    sys.exit(main())
