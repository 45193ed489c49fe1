"""An engine's process: `python -m bench.cpu.engines.process ENGINE FOLDER THREADS CORES`; worker.py starts it.

Reads requests from stdin and answers on stdout, a line of JSON each: {"call": NAME, **arguments} becomes the method
of that name, and its result, a dictionary, the answer; {"error": ...} where it raised. The first answer comes unasked,
when the model is in memory.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from bench.cpu import memory
from bench.cpu.engines.engine import KINDS, engine_module, load


class Requests:
    """What may be asked of an engine. Prompts and decoded sequences are made at their first use, outside of timings."""

    def __init__(self, engine: Any) -> None:
        """An Engine with its model."""
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

    def decoded_bytes(self) -> dict[str, int]:
        """What decoding a token reads of the model; of ours alone."""
        return {"bytes": self._engine.decoded_bytes()}

    def forget_peak(self) -> dict[str, int]:
        """Memory that the process holds; memory() gives the peak from here on."""
        memory.forget_peak()
        return {"bytes": memory.resident()}

    def memory(self, folder: str) -> dict[str, int]:
        """The most memory since forget_peak(); what is the process's own now, and what is mapped from a folder."""
        own, mapped = memory.own_and_mapped(Path(folder))
        return {"peak_bytes": memory.peak(), "own_bytes": own, "mapped_bytes": mapped}


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
    try:
        engine_module(KINDS[name])
        imported_at = time.time()
        gc.collect()  # of what the imports left behind: it would fall on the load or not, by chance
        own, _ = memory.own_and_mapped(Path(folder))
        start = time.perf_counter()
        engine = load(KINDS[name], Path(folder), int(threads))
    except Exception as error:  # as in serve
        say({"error": f"{type(error).__name__}: {error}"}, sink)
        return
    load_s = time.perf_counter() - start
    say(
        {
            "settings": engine.settings,
            "imported_at": imported_at,
            "load_s": load_s,
            "own_bytes_before": own,
        },
        sink,
    )
    serve(Requests(engine), sys.stdin, sink)


if __name__ == "__main__":
    main(*sys.argv[1:])
