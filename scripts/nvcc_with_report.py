"""Runs nvcc and keeps what ptxas reports beside the object: registers, shared memory and spills of each kernel.

CMake calls it as CMAKE_CUDA_COMPILER_LAUNCHER: `nvcc_with_report.py nvcc ... -c x.cu -o x.cu.o` writes
x.cu.o.ptxas, which scripts/ptxas_report.py reads. Everything else passes through.
"""

import subprocess
import sys
from pathlib import Path

REPORT = ("ptxas info", "    ")


def main(command: list[str]) -> int:
    """Runs the command; returns its exit status."""
    if "-c" not in command or "-o" not in command:
        return subprocess.run(command, check=False).returncode
    done = subprocess.run([*command, "-Xptxas=-v"], check=False, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines()
    is_report = [line.startswith(REPORT) for line in lines]
    other = [line for line, belongs in zip(lines, is_report, strict=True) if not belongs]
    # A report's indented lines look like the source lines below a compiler's message: where there is a
    # message, show everything.
    if other:
        print(done.stderr, end="", file=sys.stderr)
    target = Path(command[command.index("-o") + 1])
    target.with_name(f"{target.name}.ptxas").write_text(done.stderr, encoding="utf-8")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
