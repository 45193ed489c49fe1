"""Takes the engines through a plan's figures."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import machine
from bench.command import show_progress
from bench.cpu.engines import ENGINES, KINDS, OURS, EngineError, Worker, installed
from bench.cpu.engines.engine import MAPPED, PACKING, PREPACKED, W8A8
from bench.cpu.first_token import first_token
from bench.cpu.models import files
from bench.cpu.models.files import CHECKED, REFERENCE
from bench.cpu.plan import Figure, Plan, counted, memory_needed, why_not
from bench.cpu.probes import Probes
from bench.cpu.turns import take_turns
from bench.roofs import Roofs, measure_roofs
from bench.shapes import LANGUAGE_MODELS, LanguageShape

# Signal to noise of logits against the float model's. A wrong engine gives 0 dB or less, four bits in a deep model 8.
LEAST_SQNR_DB = 4.0
SAMPLE_S, MOST_CALLS = 0.05, 64  # a sample is as many calls as last so long
LONGEST_PROMPT_S = 60.0
ALL = "all"


class Session:
    """One run: what it has measured so far, and what it has left out and why."""

    def __init__(self, plan: Plan, engines: Sequence[str], root: Path) -> None:
        """A plan, the engines that take part, and the folder of the models."""
        self.plan, self._root = plan, root
        self._cores = machine.allowed_cores()
        self.samples: dict[Figure, dict[str, list[float]]] = {}
        self.probed: dict[Figure, dict[str, list[float]]] = {}
        self.roofs: dict[int, Roofs] = {}
        self.decoded_bytes: dict[str, int] = {}
        self.long_prompts: list[dict[str, Any]] = []
        self.first_tokens: list[dict[str, Any]] = []
        self.settings: dict[str, str] = {}
        self.left_out: list[dict[str, str]] = []
        self._engines = [name for name in engines if self._is_installed(name)]

    def run(self) -> None:
        """Every size on every number of threads, the roofs before and after."""
        counts = self.plan.thread_counts(len(self._cores) or os.cpu_count() or 1)
        for size in self.plan.sizes:
            shape = LANGUAGE_MODELS[size]
            folder = files.folder_of(shape, self._root)
            if not self._make(shape, folder):
                continue
            for threads in counts:
                self._probe(threads)
                self._measure(shape, folder, threads)
                self._probe(threads)
                machine.confine(self._cores)
            self._time_first_tokens(shape, folder, counts[0])

    def _is_installed(self, name: str) -> bool:
        if installed(ENGINES[name]):
            return True
        self.leave_out(name, ALL, f"not installed: {', '.join(ENGINES[name].needs)}")
        return False

    def leave_out(self, engine: str, figure: str, why: str) -> None:
        """Says why a row is missing."""
        self.left_out.append({"engine": engine, "figure": figure, "why": why})

    def _make(self, shape: LanguageShape, folder: Path) -> bool:
        """Writes the model's missing files; whether they are all there now."""
        wanted = {REFERENCE, W8A8, PREPACKED, *(ENGINES[name].file for name in self._engines)}
        show_progress(f"making {shape.name}")
        try:
            files.make_missing(folder, shape, wanted)
        except files.ModelError as error:
            self.leave_out(ALL, shape.name, str(error))
            return False
        return True

    def _probe(self, threads: int) -> None:
        """Measures the roofs in this process, while no engine is there."""
        show_progress(f"roofs, {counted(threads, 'thread')}")
        machine.pin(threads)
        measured = measure_roofs()
        self.roofs[threads] = measured.best(self.roofs.get(threads, measured))

    def _measure(self, shape: LanguageShape, folder: Path, threads: int) -> None:
        """Starts the engines of a model, and takes them through the figures."""
        with ExitStack() as stack:
            workers = {}
            for name in self._engines:
                worker = self._start(name, shape, folder, threads)
                if worker is not None:
                    workers[name] = stack.enter_context(worker)
            known: dict[str, dict[int, float]] = {name: {} for name in workers}
            if OURS in workers:
                self.decoded_bytes[shape.name] = workers[OURS].ask("decoded_bytes")["bytes"]
            probes = Probes(self.decoded_bytes.get(shape.name, 0))
            for group in self.plan.groups(shape.name, threads):
                self._take_group(group, shape, workers, probes, known)
            if OURS in workers and threads == max(self.roofs):
                self._read_long_prompts(workers[OURS], shape.name, threads)

    def _start(self, name: str, shape: LanguageShape, folder: Path, threads: int) -> Worker | None:
        """An engine that is ready and computes the model; None, and why, where there is none."""
        figure = f"{shape.name}, {counted(threads, 'thread')}"
        show_progress(f"loading {shape.name} {name}")
        try:
            self._check_memory(name, shape)
        except EngineError as error:
            self.leave_out(name, figure, str(error))
            return None
        worker = Worker(name, folder, threads, self._cores[:threads])
        try:
            self.settings[name] = worker.ready()["settings"]
            batch, tokens = CHECKED
            answer = worker.ask(
                "check", reference=str(folder / REFERENCE), batch=batch, tokens=tokens
            )
            if not answer["sqnr_db"] >= LEAST_SQNR_DB:
                raise EngineError(
                    f"logits: expected {LEAST_SQNR_DB} dB, got {answer['sqnr_db']:.1f}"
                )
        except EngineError as error:
            worker.stop()
            self.leave_out(name, figure, str(error))
            return None
        return worker

    @staticmethod
    def _check_memory(name: str, shape: LanguageShape) -> None:
        """Raises EngineError where an engine's model does not fit."""
        needed = memory_needed(KINDS[name], shape)
        if needed > machine.available_bytes():
            raise EngineError(f"loading it takes {needed >> 20:,} MiB of memory")

    def _take_group(
        self,
        group: list[Figure],
        shape: LanguageShape,
        workers: dict[str, Worker],
        probes: Probes,
        known: dict[str, dict[int, float]],
    ) -> None:
        """Warms up each engine on each figure, then takes them all in turn; a figure's probes right before ours."""
        calls: dict[tuple[Figure, str], Callable[[], float]] = {}
        for figure in group:
            for name, probe in probes.calls(figure, shape).items():
                calls[figure, name] = probe
            for name, worker in workers.items():
                show_progress(f"{figure.op} {figure.shape} {name}")
                why = why_not(
                    figure, ENGINES[name], shape, machine.available_bytes(), known[name],
                    self.plan.longest_sample_s,
                )  # fmt: skip
                try:
                    if why is None:
                        calls[figure, name] = self._warmed_up(figure, worker, known[name])
                except EngineError as error:
                    why = str(error)
                if why is not None:
                    self.leave_out(name, f"{figure.op} {figure.shape}", why)
        show_progress(f"{group[0].op} {shape.name}: {len(calls)} calls in turn")
        samples = take_turns(calls, self.plan.seconds, self.plan.minimum_rounds, self._failed)
        for (figure, name), values in samples.items():
            kept = self.samples if name in ENGINES else self.probed
            kept.setdefault(figure, {})[name] = values

    def _failed(self, call: tuple[Figure, str], error: EngineError) -> None:
        figure, name = call
        self.leave_out(name, f"{figure.op} {figure.shape}", str(error))

    def _warmed_up(
        self, figure: Figure, worker: Worker, known: dict[int, float]
    ) -> Callable[[], float]:
        """A call that gives a sample of an engine, in seconds per call of the engine.

        Raises:
            EngineError: it takes longer than the plan's longest sample.
        """
        arguments: dict[str, int] = {"batch": figure.batch}
        if figure.op == "prefill":
            arguments["tokens"] = figure.tokens

        def sample(calls: int) -> float:
            return float(worker.ask(figure.op, **arguments, calls=calls)["seconds"])

        first = sample(1)
        seconds = min(first, sample(1)) if first < 1 else first
        if figure.op == "prefill":
            known[figure.tokens_in_all] = seconds
        if seconds > self.plan.longest_sample_s:
            raise EngineError(f"a sample takes {seconds:.0f} s")
        calls = max(1, min(MOST_CALLS, round(SAMPLE_S / seconds)))
        return lambda: sample(calls)

    def _read_long_prompts(self, worker: Worker, size: str, threads: int) -> None:
        """Speed and peak memory by the length of a prompt."""
        lengths = self.plan.long_prompts
        seconds = worker.ask("prefill", batch=1, tokens=lengths[0], calls=1)["seconds"]
        before = lengths[0]
        for tokens in lengths:
            if seconds * tokens / before > LONGEST_PROMPT_S:
                self.leave_out(OURS, f"{size}, {tokens:,} tokens", f"over {LONGEST_PROMPT_S:g} s")
                continue
            show_progress(f"a prompt of {tokens} tokens, {size}")
            held = worker.ask("forget_peak")["bytes"]
            seconds = worker.ask("prefill", batch=1, tokens=tokens, calls=1)["seconds"]
            peak, before = worker.ask("memory", folder="")["peak_bytes"], tokens
            found = {"size": size, "threads": threads, "tokens": tokens, "seconds": seconds}
            self.long_prompts.append({**found, "peak_bytes": peak, "grown_bytes": peak - held})

    def _time_first_tokens(self, shape: LanguageShape, folder: Path, threads: int) -> None:
        """Every engine in turn, ours with and without a packed image; files are in the page cache by then."""
        peers = [name for name in self._engines if KINDS[name] != KINDS[OURS]]
        starts: dict[str, list[dict[str, float]]] = {n: [] for n in (MAPPED, PACKING, *peers)}
        for _, name in itertools.product(range(self.plan.starts), tuple(starts)):
            if name not in starts:
                continue
            show_progress(f"first token, {shape.name} {name}")
            try:
                self._check_memory(name, shape)
                starts[name].append(first_token(name, folder, threads, self._cores[:threads]))
            except EngineError as error:
                self.leave_out(name, f"first token {shape.name}", str(error))
                del starts[name]
        row = {"size": shape.name, "threads": threads}
        self.first_tokens += [{**row, "engine": n, "starts": s} for n, s in starts.items()]
