"""Times every operator on a GPU against its roofs: `python -m bench.gpu`, or `make bench-gpu`. See bench/README.md.

The cases are those of bench/ops, whose tensors are made on the device that is torch's default.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import gpu_machine, report, roofs
from bench.command import SEED, finish, show_progress
from bench.gpu_timer import CudaGpu, Gpu, graph_microseconds, make_timer, warm_up
from bench.harness import BenchCase, Timer, case_numbers, group_cases, groups_of, measure
from bench.roofs import Roofs
from mambaquant_ext import _C

COPY = "device copy"
WARM_UP_SIZE, WARM_UP_SECONDS = 4096, 0.5
PROBE_COPY_BYTES = 1 << 30
PROBE_GEMM_SIZE = {"int8": 8192, "float32": 4096}
GRAPH_BELOW_US = 100.0
HEADER = [
    "op", "shape", "median us", "quartiles us", "in a graph us", "GB/s", "TOP/s", "roof", "bound",
    "x baseline",
]  # fmt: skip


class Collector:
    """Rows as they come, and why some cases have none."""

    def __init__(
        self,
        timer: Timer,
        seconds: float,
        minimum_rounds: int,
        limit_s: float,
        graph: Callable[[Callable[[], object]], float] | None = graph_microseconds,
    ) -> None:
        """Settings of a run.

        Args:
            timer: times a case beside its baselines.
            seconds: of sampling per callable.
            minimum_rounds: samples per callable at least.
            limit_s: no row is begun later than this, so that a slow machine gives what it can.
            graph: times calls that follow each other in a CUDA graph; None for none.
        """
        self.timer, self._graph = timer, graph
        self._seconds, self._minimum_rounds = seconds, minimum_rounds
        self._deadline = time.monotonic() + limit_s
        self.measured: list[tuple[BenchCase, dict[str, Any], float | None, list[str]]] = []
        self.not_timed: list[dict[str, str]] = []

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._deadline

    def add(self, case: BenchCase) -> None:
        """Checks and times a case, or notes what is wrong with it."""
        if self.is_late:
            self.note(case.op, case.shape, "the time limit was reached")
            return
        try:
            baselines, dropped = usable_baselines(case)
            timings = measure(
                replace(case, baselines=baselines), self._seconds, self._minimum_rounds, self.timer
            )
            is_short = self._graph is not None and timings["ours"].median_us < GRAPH_BELOW_US
            graph_us = self._graph(case.run) if is_short else None
        except AssertionError as error:
            self.note(case.op, case.shape, f"wrong result: {first_line(error)}")
            return
        except (RuntimeError, ValueError, NotImplementedError) as error:
            self.note(case.op, case.shape, first_line(error))
            return
        # Only the numbers are kept: a case holds its tensors.
        self.measured.append((case_numbers(case), timings, graph_us, dropped))

    def note(self, op: str, shape: str, reason: str) -> None:
        """Remembers a case without a row."""
        self.not_timed.append({"op": op, "shape": shape, "reason": reason})

    def rows(self, limits: Roofs) -> list[report.Row]:
        """What was timed, against the roofs."""
        return [
            {
                **report.case_row(case, timings, limits, lambda _working_set: "memory"),
                "graph_us": graph_us,
                "baselines_without_a_result": dropped,
            }
            for case, timings, graph_us, dropped in self.measured
        ]


def first_line(error: Exception) -> str:
    """Of its message, after the kind of error."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def usable_baselines(case: BenchCase) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """The baselines that run here, with a copy of as many bytes; and those that do not, with the reason."""
    half = max(1, case.bytes_moved // 2)
    source, target = (torch.zeros(half, dtype=torch.uint8) for _ in range(2))
    usable: dict[str, Callable[[], object]] = {COPY: lambda: target.copy_(source)}
    dropped = []
    for name, run in case.baselines.items():
        if name == "copy":  # of one operand
            continue
        try:
            run()
        except Exception as error:  # whatever a package of somebody else's raises
            dropped.append(f"{name}: {first_line(error)}")
        else:
            usable[name] = run
    return usable, dropped


def guarded_cases(
    preset: str, groups: dict[str, list[str]], collector: Collector
) -> Iterator[BenchCase]:
    """The cases group by group: where a group's data cannot be made, that is noted and the next one comes."""
    for group, names in groups.items():
        try:
            yield from group_cases(group, preset, names)
        except (RuntimeError, NotImplementedError) as error:
            collector.note(group, "", first_line(error))


def measure_gpu_roofs(timer: Timer) -> Roofs:
    """Copy bandwidth of memory, int8 and float32 products, and the shortest call, all between events."""
    copy = {"memory": roofs.copy_bandwidth(PROBE_COPY_BYTES, timer)}
    arithmetic = {
        "int8": roofs.int8_gemm_rate(PROBE_GEMM_SIZE["int8"], timer),
        "float32": roofs.float32_gemm_rate(PROBE_GEMM_SIZE["float32"], timer),
    }
    return Roofs(copy, arithmetic, roofs.call_microseconds(timer))


def cells(row: report.Row) -> list[str]:
    """A row as text, in the order of HEADER."""
    median, quartiles, _ = report.timing_cells(row["timings"][report.OURS])
    graph = row["graph_us"]
    return [
        row["op"],
        row["shape"],
        median,
        quartiles,
        "-" if graph is None else report.microseconds(graph),
        f"{row['bytes_per_second'] / 1e9:.0f}",
        f"{row['operations_per_second'] / 1e12:.2f}",
        f"{row['share_of_roof']:.0%}",
        row["bound"],
        report.baseline_cell(row),
    ]


def run(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer shapes and samples: about a minute.")
    ] = False,
    op: Annotated[
        list[str] | None, typer.Option("--op", help="Operator or group (gemm); may be repeated.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.001, help="Of sampling, per row and callable.")
    ] = None,
    limit_s: Annotated[
        float | None, typer.Option(min=1, help="No row is begun later. Default: 70 or 300.")
    ] = None,
    json: Annotated[Path, typer.Option("--json", dir_okay=False)] = Path("bench-output/gpu.json"),
) -> None:
    """Check every operator on the GPU, time it with a cold L2, and hold it against the GPU's roofs."""
    if not _C.has_cuda or not torch.cuda.is_available():
        what = "this machine has no GPU" if _C.has_cuda else "this build has no CUDA kernels"
        raise typer.BadParameter(f"{what}; `make bench-gpu` builds and runs on one that has")
    try:
        groups = groups_of(op or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    preset = "gpu-quick" if quick else "gpu"
    span = seconds or (0.02 if quick else 0.05)
    gpu = CudaGpu()
    collector = Collector(
        make_timer(gpu), span, 8 if quick else 16, limit_s or (70 if quick else 300)
    )
    described = gpu_machine.describe()
    limits = collect("cuda", gpu, guarded_cases(preset, groups, collector), collector)
    values = {
        "schema": report.SCHEMA,
        "command": "bench-gpu",
        "preset": preset,
        "seconds": span,
        "machine": described,
        "clocks_at_the_end": gpu_machine.query(),
        "roofs": limits.to_dict(),
        "not_timed": collector.not_timed,
        "rows": collector.rows(limits),
    }
    body = [cells(row) for row in values["rows"]]
    finish("Operators on a GPU", values, HEADER, body, json)
    for item in collector.not_timed:
        print(f"not timed: {item['op']} {item['shape']}: {item['reason']}")
    raise typer.Exit(1 if collector.not_timed else 0)


def collect(device: str, gpu: Gpu, cases: Iterable[BenchCase], collector: Collector) -> Roofs:
    """Takes all cases into the collector; roofs before and after, of which the better count.

    A fault of a kernel ends the run, since nothing on that device works after it; the rows before it stay.
    """
    torch.manual_seed(SEED)
    with torch.device(device):
        matrix = torch.zeros(WARM_UP_SIZE, WARM_UP_SIZE).half()
        warm_up(lambda: matrix @ matrix, gpu, WARM_UP_SECONDS)  # brings the clocks up
        before = measure_gpu_roofs(collector.timer)
        try:
            for case in cases:
                show_progress(f"{case.op} {case.shape}")
                collector.add(case)
                gpu.synchronize()
            return before.best(measure_gpu_roofs(collector.timer))
        except torch.AcceleratorError as error:
            collector.note("", "", f"the run ended: {first_line(error)}")
            return before


if __name__ == "__main__":
    typer.run(run)
