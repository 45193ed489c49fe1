"""An engine's process: `python -m bench.engine_process ENGINE FOLDER THREADS CORES`. bench.workers starts it.

Reads requests from stdin and answers on stdout, a line of JSON each: {"call": NAME, **arguments} becomes the method
of that name, and its result, a dictionary, the answer; {"error": ...} where it raised. The first answer comes unasked,
when the model is in memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from bench.engines import ENGINES, Engine, engine_module, load

STATUS, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Requests:
    """What may be asked of an engine. Prompts and decoded sequences are made at their first use, outside of timings."""

    def __init__(self, engine: Engine) -> None:
        """An engine with its model."""
        self._engine = engine
        self._prompts: dict[tuple[int, int], Any] = {}
        self._sequences: dict[int, Any] = {}

    def prefill(self, batch: int, tokens: int, calls: int) -> dict[str, float]:
        """Seconds of reading prompts, per call."""
        key = (batch, tokens)
        if key not in self._prompts:
            self._prompts[key] = self._engine.prompts(batch, tokens)
        ids = self._prompts[key]
        return {"seconds": seconds_of(lambda: self._engine.prefill(ids), calls)}

    def decode(self, batch: int, calls: int) -> dict[str, float]:
        """Seconds of decoding one token of each sequence, per token."""
        if batch not in self._sequences:
            self._sequences[batch] = self._engine.start(batch)
        sequences = self._sequences[batch]
        return {"seconds": seconds_of(lambda: self._engine.step(sequences), calls)}

    def check(self, reference: str, batch: int, tokens: int) -> dict[str, float]:
        """How near the logits of prompts are to those of the float model: signal to noise in dB.

        Args:
            reference: a file of numpy, (batch, vocab).
            batch: of the prompts.
            tokens: of each prompt.
        """
        logits = self._engine.prefill(self._engine.prompts(batch, tokens))
        return {"sqnr_db": sqnr_db(np.load(reference), np.asarray(logits, np.float64))}

    def forget_peak(self) -> dict[str, int]:
        """Memory that the process holds; memory() gives the peak from here on."""
        FORGET_PEAK.write_text("5")
        return {"bytes": memory_bytes("VmRSS")}

    def memory(self) -> dict[str, int]:
        """The most memory that the process has held since forget_peak()."""
        return {"peak_bytes": memory_bytes("VmHWM")}


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status, which counts in KiB."""
    (line,) = (v for v in STATUS.read_text().splitlines() if v.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def seconds_of(run: Callable[[], object], calls: int) -> float:
    """Seconds per call, of so many."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def sqnr_db(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """Of two arrays of one shape."""
    error = np.square(got - expected).sum()
    return float(10 * np.log10(np.square(expected).sum() / max(error, 1e-30)))


def serve(requests: Any, source: IO[str], sink: IO[str]) -> None:
    """Answers the lines of source until it ends. A request that fails ends nothing."""
    for line in source:
        request = json.loads(line)
        try:
            answer = getattr(requests, request.pop("call"))(**request)
        except Exception as error:  # whatever an engine raises belongs into the report
            answer = {"error": f"{type(error).__name__}: {error}"}
        say(answer, sink)


def say(answer: dict[str, Any], sink: IO[str]) -> None:
    """One line."""
    sink.write(json.dumps(answer) + "\n")
    sink.flush()


def main(name: str, folder: str, threads: str, cores: str) -> None:
    """Pins the process, loads, says so, and serves. Whatever libraries print goes to stderr."""
    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    start = time.perf_counter()
    try:
        engine_module(ENGINES[name])
        imported = time.perf_counter()
        engine = load(ENGINES[name], Path(folder), int(threads))
    except Exception as error:  # as in serve
        say({"error": f"{type(error).__name__}: {error}"}, sink)
        return
    spent = {"import_s": imported - start, "load_s": time.perf_counter() - imported}
    say({"settings": engine.settings, **spent}, sink)
    serve(Requests(engine), sys.stdin, sink)


if __name__ == "__main__":
    main(*sys.argv[1:])
