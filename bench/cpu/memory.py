"""The memory of this process, as Linux counts it. Without torch, which a process of llama.cpp does not load."""

from __future__ import annotations

from pathlib import Path

PROCESS = Path("/proc/self")


def forget_peak() -> None:
    """Makes peak() count from here on."""
    (PROCESS / "clear_refs").write_text("5")


def resident() -> int:
    """Bytes that are in memory now."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that were in memory at a time."""
    return _status("VmHWM")


def own_and_mapped(folder: Path) -> tuple[int, int]:
    """Bytes in memory that are this process's own, and bytes in memory of a folder's files."""
    own, mapped, is_inside = 0, 0, False
    folder = folder.resolve()
    for line in (PROCESS / "smaps").read_text(encoding="utf-8").splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            is_inside = f" {folder}/" in line
        elif name == "Anonymous:":
            own += int(values[0]) << 10
        elif name == "Rss:" and is_inside:
            mapped += int(values[0]) << 10
    return own, mapped


def _status(field: str) -> int:
    """A field of /proc/self/status, which counts in KiB."""
    lines = (PROCESS / "status").read_text(encoding="utf-8").splitlines()
    (line,) = (v for v in lines if v.startswith(f"{field}:"))
    return int(line.split()[1]) << 10
