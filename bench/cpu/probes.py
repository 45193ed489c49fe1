"""What the machine gives while the engines are measured: its roofs as calls that take turns with theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.cpu.engines.process import seconds_of
from bench.cpu.plan import RATED_TOKENS, Figure
from bench.ops.selective_scan import prefill_case
from bench.roofs import GEMM_SIZE, int8_gemm, memory_readers
from bench.shapes import LanguageShape

READ, REREAD, INT8, SCAN = "read", "reread", "int8", "scan"
SCAN_READOUT = "rotated int8"  # of the recipe w8a8
SAMPLE_S = 0.05  # of each probe in a round

Probe = Callable[[], float]


class Probes:
    """Calls in this process, on the threads that torch has.

    Of several ways to use the machine the quickest counts. A sample is the mean of some calls, as an engine's is, so
    that what disturbs the machine disturbs both sides of a share: a roof from quickest calls against a mean would
    tell how noisy the machine is.
    """

    def __init__(self, decoded_bytes: int) -> None:
        """Makes the operands.

        Args:
            decoded_bytes: that decoding a token reads of the model; 0 where that is not known.
        """
        self._reads = {READ: memory_readers()}
        if decoded_bytes:
            self._reads[REREAD] = memory_readers(decoded_bytes)
        self._gemm = _mean_of_calls(int8_gemm(), 2 * GEMM_SIZE**3)

    def calls(self, figure: Figure, shape: LanguageShape) -> dict[str, Probe]:
        """The probes that a figure's share is made from, warmed up.

        Args:
            figure: of op decode, or of op prefill with RATED_TOKENS tokens or more; any other has none.
            shape: of its model.

        Returns:
            READ, seconds per byte of more than the caches hold. REREAD, of as much as decoding reads, over and over:
            what caches keep of that from one time to the next, they keep of the weights as well. INT8, seconds per
            operation of torch._int_mm. SCAN, seconds of the scan's kernel on one layer of one sequence, in one call or
            in calls of RATED_TOKENS tokens, whose operands stay in caches.
        """
        if figure.op == "decode":
            return {
                name: _quickest(
                    [_mean_of_calls(reader.run, reader.size_bytes) for reader in readers]
                )
                for name, readers in self._reads.items()
            }
        if figure.tokens < RATED_TOKENS:
            return {}
        scans = [
            _mean_of_calls(_scan(shape, length), length / figure.tokens)
            for length in {RATED_TOKENS, figure.tokens}
        ]
        return {INT8: self._gemm, SCAN: _quickest(scans)}


def _scan(shape: LanguageShape, tokens: int) -> Callable[[], object]:
    return prefill_case(shape.layer, tokens, SCAN_READOUT, "quick").run


def _quickest(probes: Sequence[Probe]) -> Probe:
    """The least of one sample each."""
    return lambda: min(probe() for probe in probes)


def _mean_of_calls(run: Callable[[], object], per: float) -> Probe:
    """The seconds per so many parts of run, over SAMPLE_S."""
    run()
    calls = max(1, round(SAMPLE_S / seconds_of(run, 1)))
    return lambda: seconds_of(run, calls) / per
