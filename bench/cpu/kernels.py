"""The kernels beside torch, eager and compiled: bench.run in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import report

GROUPS = ("conv1d", "gemm", "hadamard", "norm", "selective_scan")
FORCED_ISA = "avx2"


class KernelError(RuntimeError):
    """bench.run failed; the message holds its last line."""


def measure_kernels(threads: int, path: Path, isa: str | None = None) -> dict[str, Any]:
    """A result of bench.run.

    Args:
        threads: to compute with.
        path: of its JSON file.
        isa: to force; None for the best.

    Raises:
        KernelError: it failed.
    """
    command = [sys.executable, "-m", "bench.run", "--preset", "cpu", "--json", str(path)]
    command += ["--threads", str(threads), *(f"--op={group}" for group in GROUPS)]
    command += [] if isa is None else ["--isa", isa]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KernelError(f"bench.run: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return report.read_json(path)
