"""From the start of a process to a prompt's logits: the one measurement of bench.cpu and of bench.load."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from bench.cpu.engines import KINDS, Worker

TOKENS = 128  # of the prompt
PARTS = ("import_s", "load_s", "prompt_s")


def first_token(name: str, folder: Path, threads: int, cores: Sequence[int]) -> dict[str, float]:
    """One start of an engine in a process that has done nothing else.

    Args:
        name: of KINDS.
        folder: of the model, of bench.cpu.models.
        threads: to compute with.
        cores: to stay on; empty for any.

    Returns:
        PARTS: Python and the packages, the model, the first prompt; "seconds", all three; "own_bytes" that the model
        and the prompt added to the process, "mapped_bytes" of the model's files, and "peak_bytes".

    Raises:
        EngineError: the engine cannot be loaded, or raised something.
    """
    started_at = time.time()
    with Worker(name, folder, threads, cores) as worker:
        ready = worker.ready()
        prompt_s = worker.ask("prefill", batch=1, tokens=TOKENS, calls=1)["seconds"]
        held = worker.ask("memory", folder=str(folder / KINDS[name].file))
    parts = (ready["imported_at"] - started_at, ready["load_s"], prompt_s)
    return {
        **dict(zip(PARTS, parts, strict=True)),
        "seconds": sum(parts),
        "own_bytes": held["own_bytes"] - ready["own_bytes_before"],
        "mapped_bytes": held["mapped_bytes"],
        "peak_bytes": held["peak_bytes"],
    }


def drop_from_cache(folder: Path) -> None:
    """Makes the next read of a folder's files come from the disk; pages that are not written yet stay."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
