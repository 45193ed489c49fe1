"""The process of an engine, seen from outside: between two questions it waits for a line, and costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.cpu.engines.engine import KINDS

STOP_S = 30.0


class EngineError(RuntimeError):
    """What an engine raised, or that its process has ended."""


class Worker:
    """The process of one engine with one model. A context manager, which ends it."""

    def __init__(self, name: str, folder: Path, threads: int, cores: Sequence[int]) -> None:
        """Starts the process; ready() waits for it.

        Args:
            name: of KINDS.
            folder: the model's, of bench.cpu.models.
            threads: to compute with.
            cores: to stay on; empty for any.
        """
        command = [
            sys.executable,
            "-m",
            "bench.cpu.engines.process",
            name,
            str(folder),
            str(threads),
        ]
        self.name = name
        self._process = subprocess.Popen(
            [*command, ",".join(map(str, cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **KINDS[name].environment},
        )

    def ready(self) -> dict[str, Any]:
        """Waits for the model to be in memory.

        Returns:
            {"settings": ..., "imported_at": ..., "load_s": ..., "own_bytes_before": ...}, seconds of the clock of
            time.time() and the memory of the process between its imports and its model.

        Raises:
            EngineError: it could not be loaded.
        """
        return self._answer()

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Args:
            call: a method of bench.cpu.engines.process.Requests.
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
