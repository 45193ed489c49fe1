"""Times callables on a GPU as harness.interleave does on a CPU: in turn, A B C A B C, between CUDA events.

Each call meets an L2 that holds none of its data, and a queue that is full: a whole batch of calls is queued behind
a kernel that spins, so that no time of the host is inside an interval. A batch whose first call began before its
last was queued is thrown away and queued again, further ahead.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

from bench import gpu_machine
from bench.harness import Timing, timing_of

Runs = dict[str, Callable[[], object]]

WARM_UP_SECONDS = 0.01
ROUNDS = 8  # of a batch: well below the some 1,000 launches that a queue holds
TRIES = 6
SMALLEST_FLUSH = (
    128 << 20
)  # lasts 40 us or more on every GPU of today, longer than the host takes to queue a call
SPIN_HZ = 2.0e9  # clocks a second that torch.cuda._sleep counts, or fewer: it then spins for longer
GRAPH_CALLS, GRAPH_REPLAYS = 20, 15


class Event(Protocol):
    """torch.cuda.Event, of which a test has its own."""

    def record(self) -> None:
        """Marks the end of what is queued."""

    def query(self) -> bool:
        """Whether all before the mark is done."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds between two marks."""


class Gpu(Protocol):
    """What the timer asks of a device, of which a test has its own."""

    def flush(self) -> None:
        """Queues what leaves nothing of a call's data in L2."""

    def spin(self, seconds: float) -> None:
        """Queues a wait."""

    def event(self) -> Event:
        """A new event."""

    def synchronize(self) -> None:
        """Waits for all that is queued."""


class CudaGpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        size = max(SMALLEST_FLUSH, 2 * gpu_machine.l2_bytes())
        self._scratch = torch.zeros(size // 4, device="cuda")
        self._sum = torch.empty((), device="cuda")

    def flush(self) -> None:
        """Reads twice L2. A write would leave lines there that the timed call has to write back."""
        torch.sum(self._scratch, dim=0, out=self._sum)

    def spin(self, seconds: float) -> None:
        """Queues a wait of that long at least."""
        torch.cuda._sleep(int(seconds * SPIN_HZ))

    def event(self) -> Event:
        """A new event."""
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize()


class NotAheadError(RuntimeError):
    """A call waits for the GPU, or takes the host so long that its time would be timed."""


def make_timer(gpu: Gpu) -> Callable[[Runs, float, int], dict[str, Timing]]:
    """A harness.Timer on a device."""

    def timer(runs: Runs, seconds: float = 0.1, minimum_rounds: int = 16) -> dict[str, Timing]:
        """As harness.interleave, with a cold L2.

        Raises:
            NotAheadError: the host cannot stay ahead of the GPU.
        """
        for run in runs.values():
            warm_up(run, gpu)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        first = next(iter(runs))
        lead = 1e-3
        deadline = time.perf_counter() + seconds * len(runs)
        while time.perf_counter() < deadline or len(samples[first]) < minimum_rounds:
            batch, lead = queued_batch(runs, gpu, lead)
            for name, values in batch.items():
                samples[name] += values
        return {name: timing_of(values) for name, values in samples.items()}

    return timer


def warm_up(run: Callable[[], object], gpu: Gpu, seconds: float = WARM_UP_SECONDS) -> None:
    """Calls for a while, once at least: what is compiled or chosen at the first call is not timed."""
    deadline = time.perf_counter() + seconds
    run()
    gpu.synchronize()
    while time.perf_counter() < deadline:
        run()
        gpu.synchronize()


def queued_batch(runs: Runs, gpu: Gpu, lead: float) -> tuple[dict[str, list[float]], float]:
    """Microseconds of each call of a batch that was queued in whole before it began; the lead that took.

    Args:
        runs: name to callable.
        gpu: where.
        lead: seconds to spin while the batch is queued, in the first try.

    Raises:
        NotAheadError: no lead was enough.
    """
    for _ in range(TRIES):
        gpu.spin(lead)
        start = time.perf_counter()
        marks: list[tuple[str, Event, Event]] = []
        for _ in range(ROUNDS):
            for name, run in runs.items():
                gpu.flush()
                begin, end = gpu.event(), gpu.event()
                begin.record()
                run()
                end.record()
                marks.append((name, begin, end))
        host_seconds = time.perf_counter() - start
        was_ahead = not marks[0][1].query()
        gpu.synchronize()
        if was_ahead:
            samples: dict[str, list[float]] = {name: [] for name in runs}
            for name, begin, end in marks:
                samples[name].append(begin.elapsed_time(end) * 1e3)
            return samples, lead
        lead = max(2 * lead, 1.5 * host_seconds)
    raise NotAheadError(
        f"the GPU caught up with the host, which queued a batch in {host_seconds * 1e3:.1f} ms"
    )


def graph_microseconds(run: Callable[[], object]) -> float:
    """Microseconds per call where one follows another in a CUDA graph: no event between, caches as they come."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            run()
    marks = []
    for _ in range(GRAPH_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks) * 1e3 / GRAPH_CALLS
