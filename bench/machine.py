"""What a result must say about the machine and the software that it comes from."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import mambaquant_ext
from mambaquant_ext import _load

CPU_FOLDER = Path("/sys/devices/system/cpu")
BUSY_LOAD = 0.5  # runnable processes per core, above which a result is marked


def cpu_name() -> str:
    """The processor's name for itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


@cache
def cache_bytes(level: int) -> int:
    """Size of the data cache that a core sees at this level; 0 where the system does not tell."""
    for folder in sorted(CPU_FOLDER.glob("cpu0/cache/index*")):
        try:
            if int((folder / "level").read_text()) != level:
                continue
            if (folder / "type").read_text().strip() == "Instruction":
                continue
            size = (folder / "size").read_text().strip()
        except OSError:
            continue
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        return int(size.rstrip("KMG")) * units.get(size[-1], 1)
    return 0


def cold_bytes() -> int:
    """So many bytes, read in turn, that no cache holds any of them when their turn comes again."""
    return max(1 << 28, 2 * cache_bytes(3))


def place_of(working_set: int) -> str:
    """The nearest memory that a working set fits: "L2" (of all threads together), "L3" or "memory"."""
    if working_set <= cache_bytes(2) * torch.get_num_threads():
        return "L2"
    return "L3" if working_set <= cache_bytes(3) else "memory"


def allowed_cores() -> list[int]:
    """The cores that this process may use; empty where the system cannot pin."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []


def confine(cores: list[int]) -> None:
    """Lets this process, and those that it starts from here on, use these cores alone; none stands for no change."""
    if cores:
        os.sched_setaffinity(0, cores)


def pin(threads: int) -> list[int]:
    """Confines this process to as many cores as it has threads, the first that it may use.

    Args:
        threads: of every parallel region from here on.

    Returns:
        The cores; empty where the system cannot pin.

    Raises:
        ValueError: fewer cores than threads.
    """
    torch.set_num_threads(threads)
    allowed = allowed_cores()
    if not allowed:
        return []
    if len(allowed) < threads:
        raise ValueError(
            f"--threads: expected at most {len(allowed)} (cores allowed), got {threads}"
        )
    confine(allowed[:threads])
    return allowed[:threads]


def available_bytes() -> int:
    """Memory that new processes may take; 0 where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found.group(1)) << 10 if found else 0


def describe(pinned_cores: list[int]) -> dict[str, Any]:
    """Everything but the figures, ready for JSON; to be called before the timing starts."""
    load = os.getloadavg()
    cores = os.cpu_count() or 1
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "isa": mambaquant_ext.current_isa(),
        "threads": torch.get_num_threads(),
        "pinned_cores": pinned_cores,
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "load_average": list(load),
        "is_busy": load[0] / cores > BUSY_LOAD,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {
            "mambaquant_ext": mambaquant_ext.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": _load.build_info()["compiler"],
        },
    }


def _commit() -> str:
    """The checked-out commit; "-modified" where tracked files differ from it.

    A copy without its history is told by MBQ_COMMIT.
    """
    if given := os.environ.get("MBQ_COMMIT"):
        return given
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=-modified"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
