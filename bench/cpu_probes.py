"""What the machine gives while the engines are measured: its roofs as calls that take turns with theirs."""

from __future__ import annotations

from collections.abc import Callable

from bench.cpu_plan import RATED_TOKENS, Figure
from bench.engine_process import seconds_of
from bench.ops.selective_scan import prefill_case
from bench.roofs import GEMM_SIZE, int8_gemm, memory_reads
from bench.shapes import LanguageShape

READ, INT8, SCAN = "read", "int8", "scan"
SCAN_READOUT = "rotated int8"  # of the recipe w8a8
SAMPLE_S = 0.02  # at least, of calls in a row


class Probes:
    """Calls in this process, on the threads that torch has."""

    def __init__(self) -> None:
        """Makes the operands."""
        self._read_bytes, reads = memory_reads()
        self._read, self._gemm = reads["int64"], int8_gemm()

    def calls(self, figure: Figure, shape: LanguageShape) -> dict[str, Callable[[], float]]:
        """The probes that a figure's share is made from, warmed up.

        Args:
            figure: of op decode, or of op prefill with RATED_TOKENS tokens or more; any other has none.
            shape: of its model.

        Returns:
            READ, seconds per byte; INT8, seconds per operation of torch._int_mm; SCAN, seconds of the scan's
            kernel on one layer of one sequence.
        """
        if figure.op == "decode":
            return {READ: _sample(self._read, self._read_bytes)}
        if figure.tokens < RATED_TOKENS:
            return {}
        scan = prefill_case(shape.layer, figure.tokens, SCAN_READOUT, "cpu").run
        return {INT8: _sample(self._gemm, 2 * GEMM_SIZE**3), SCAN: _sample(scan, 1)}


def _sample(run: Callable[[], object], per: int) -> Callable[[], float]:
    """A call that gives seconds per so many parts of run."""
    run()
    calls = max(1, round(SAMPLE_S / seconds_of(run, 1)))
    return lambda: seconds_of(run, calls) / per
