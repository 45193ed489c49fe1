"""Timing of one case: a checked kernel beside its baselines, interleaved, in one process.

A case says what it moves and computes, so that every figure can be held against the machine's own
roofs (bench/roofs.py), which are measured in the same run.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

import mambaquant_ext.ops

EAGER, COMPILED = "torch eager", "torch.compile"


@dataclass(frozen=True)
class BenchCase:
    """One operator at one shape.

    Attributes:
        op: name of the operator.
        shape: model and sizes; unique among the cases of one operator.
        run: calls the operator.
        check: compares with the float64 reference and raises; a wrong kernel has no speed.
        bytes_moved: each input once and each output once.
        operations: a multiply and an add count as two.
        baselines: name to callable, timed beside the operator. EAGER is the same computation in plain
            torch, which a run may have compiled too.
        arithmetic: which arithmetic roof applies, "int8" or "float32".
        working_set_bytes: what successive calls touch before they come back to the same bytes. None
            stands for bytes_moved: every call works on the same tensors, which stay in the caches
            that they fit. A case that takes copies of its weights in turn says how large they are
            together: its caches are cold if that exceeds them.
    """

    op: str
    shape: str
    run: Callable[[], object]
    check: Callable[[], None]
    bytes_moved: int
    operations: int
    baselines: dict[str, Callable[[], object]] = field(default_factory=dict)
    arithmetic: str = "float32"
    working_set_bytes: int | None = None

    @property
    def working_set(self) -> int:
        """working_set_bytes, or what stands for it."""
        return self.bytes_moved if self.working_set_bytes is None else self.working_set_bytes


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, quartiles, and the fastest sample.

    On a machine with other work the fastest sample is the one that was disturbed least.
    """

    median_us: float
    lower_us: float
    upper_us: float
    best_us: float


class Timer(Protocol):
    """Times callables in turn: interleave on the CPU, bench.gpu_timer on a GPU."""

    def __call__(
        self, runs: dict[str, Callable[[], object]], seconds: float = ..., minimum_rounds: int = ...
    ) -> dict[str, Timing]:
        """As interleave."""
        ...


def interleave(
    runs: dict[str, Callable[[], object]], seconds: float = 0.5, minimum_rounds: int = 7
) -> dict[str, Timing]:
    """Times the callables in turn, A B C A B C ...: a drift of the machine meets all of them.

    Two calls of each come first: the first warms up, the second says how many calls last about a
    millisecond, and that many make up one sample.

    Args:
        runs: name to callable.
        seconds: of sampling per callable.
        minimum_rounds: samples of each, however long they take; at least 2.

    Returns:
        Name to timing.
    """
    calls = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, int(1e-3 / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < deadline or len(samples[next(iter(runs))]) < minimum_rounds:
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            samples[name].append((time.perf_counter() - start) / calls[name] * 1e6)
    return {name: timing_of(values) for name, values in samples.items()}


def timing_of(values: list[float]) -> Timing:
    """Of samples in microseconds, two at least."""
    lower, median, upper = statistics.quantiles(values, n=4)
    return Timing(median, lower, upper, min(values))


def measure(
    case: BenchCase,
    seconds: float = 0.5,
    minimum_rounds: int = 7,
    timer: Timer = interleave,
    compiled: bool = False,
) -> dict[str, Timing]:
    """Checks the case, then times it as "ours" beside its baselines.

    Args:
        case: to time.
        seconds: of sampling per callable.
        minimum_rounds: samples per callable at least.
        timer: as interleave.
        compiled: time torch.compile of the case's EAGER too, unless it comes with a COMPILED of its own.

    Raises:
        AssertionError: the kernel is wrong; nothing has been timed then.
    """
    case.check()
    runs = {"ours": case.run, **case.baselines}
    if compiled and EAGER in runs and COMPILED not in runs:
        torch.compiler.reset()  # one code object, compiled for many shapes, falls back to eager
        runs[COMPILED] = torch.compile(runs[EAGER], dynamic=False)
    return timer(runs, seconds, minimum_rounds)


def case_numbers(case: BenchCase) -> BenchCase:
    """The case without what it runs."""
    return BenchCase(
        case.op, case.shape, lambda: None, lambda: None, case.bytes_moved, case.operations,
        arithmetic=case.arithmetic, working_set_bytes=case.working_set_bytes,
    )  # fmt: skip


def optional(module: str, name: str) -> Callable[..., object] | None:
    """A function of a package that a baseline needs, or None where it cannot be imported."""
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None
    return found if callable(found) else None


def groups_of(names: Collection[str] = ()) -> dict[str, list[str]]:
    """Each wanted group of cases, with those of the names that are in it; all groups where there are no names.

    Args:
        names: of groups ("norm") or operators ("rmsnorm_quantize").

    Raises:
        ValueError: a name that is neither.
    """
    from bench import ops

    groups = [module.__name__.rpartition(".")[2] for module in ops.MODULES]
    of_operator = {name: group_of(name) for name in mambaquant_ext.ops.__all__}
    for name in names:
        if name not in groups and name not in of_operator:
            known = ", ".join([*groups, *of_operator])
            raise ValueError(f"--op: expected one of {known}, got {name!r}")
    wanted = {g: [n for n in names if g in (n, of_operator.get(n))] for g in groups}
    return {group: found for group, found in wanted.items() if found or not names}


def group_cases(group: str, preset: str, names: Collection[str] = ()) -> Iterator[BenchCase]:
    """The cases of a group, or of some of its operators, made one at a time, since they hold their data."""
    module = importlib.import_module(f"bench.ops.{group}")
    for case in module.cases(preset):
        if not names or group in names or case.op in names:
            yield case


def all_cases(preset: str, names: Collection[str] = ()) -> Iterator[BenchCase]:
    """The cases of every group.

    Args:
        preset: of shapes.py: "quick", "full", "gpu-quick" or "gpu".
        names: as in groups_of; none stands for all.

    Raises:
        ValueError: a name that is neither a group nor an operator.
    """
    for group, wanted in groups_of(names).items():
        yield from group_cases(group, preset, wanted)


def group_of(op: str) -> str:
    """The group of an operator: the module of its wrapper."""
    return str(getattr(mambaquant_ext.ops, op).__module__).rpartition(".")[2]
