"""Processes of engines, asked in turn: one works at a time, the others wait for their next line and cost nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from bench.engines import ENGINES

SETTLE_S = 0.02  # for the threads of the one that has just answered to fall asleep
STOP_S = 30.0


Key = TypeVar("Key", bound=Hashable)


class EngineError(RuntimeError):
    """What an engine raised, or that its process has ended."""


class Worker:
    """The process of one engine with one model. A context manager, which ends it."""

    def __init__(self, name: str, folder: Path, threads: int, cores: Sequence[int]) -> None:
        """Starts the process; ready() waits for it.

        Args:
            name: of ENGINES.
            folder: the model's, of bench.language_models.
            threads: to compute with.
            cores: to stay on; empty for any.
        """
        command = [sys.executable, "-m", "bench.engine_process", name, str(folder), str(threads)]
        self.name = name
        self._process = subprocess.Popen(
            [*command, ",".join(map(str, cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **ENGINES[name].environment},
        )

    def ready(self) -> dict[str, Any]:
        """Waits for the model to be in memory.

        Returns:
            {"settings": ..., "import_s": ..., "load_s": ...}.

        Raises:
            EngineError: it could not be loaded.
        """
        return self._answer()

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Args:
            call: a method of bench.engine_process.Requests.
            arguments: of that method.

        Raises:
            EngineError: the engine raised something, or is gone.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineError(f"{self.name}: its process has ended") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"{self.name}: its process has ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer

    def stop(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def first_token(start: Callable[[], Worker], tokens: int) -> dict[str, float]:
    """Seconds from the start of a process to the logits behind a prompt, and their parts.

    Args:
        start: a process.
        tokens: of the prompt.

    Raises:
        EngineError: as the worker.
    """
    begin = time.perf_counter()
    with start() as worker:
        ready = worker.ready()
        prompt_s = worker.ask("prefill", batch=1, tokens=tokens, calls=1)["seconds"]
        total_s = time.perf_counter() - begin
    parts = {name: ready[name] for name in ("import_s", "load_s")}
    return {"seconds": total_s, **parts, "prompt_s": prompt_s}


def take_turns(
    calls: Mapping[Key, Callable[[], float]],
    seconds: float,
    minimum_rounds: int,
    failed: Callable[[Key, EngineError], None],
    settle: Callable[[], None] = lambda: time.sleep(SETTLE_S),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Samples of each call, in rounds a b c a b c: a drift of the machine meets all of them.

    Each has so many seconds; one that has used them up, after the least number of rounds, sits out the rest, so that
    slow peers do not keep the quick ones from having many samples. A sample's index is its round.

    Args:
        calls: each gives one sample.
        seconds: that each may use.
        minimum_rounds: samples of each at least.
        failed: told of a call that raises EngineError, which has no samples then.
        settle: called between two calls.
        clock: seconds.
    """
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    while due := [n for n in samples if len(samples[n]) < minimum_rounds or spent[n] < seconds]:
        for name in due:
            settle()
            start = clock()
            try:
                samples[name].append(calls[name]())
            except EngineError as error:
                failed(name, error)
                del samples[name]
            spent[name] += clock() - start
    return samples
