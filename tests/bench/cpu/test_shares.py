"""Figures held against the roofs of their own round."""

import pytest
from bench.cpu.engines import OURS
from bench.cpu.probes import INT8, READ, REREAD, SCAN
from bench.cpu.shares import shares
from bench.shapes import LANGUAGE_MODELS
from tests.bench.cpu.samples import M130, decode, prefill, samples_of


class TestShares:
    def found(self, probed):
        return shares(samples_of(), probed, LANGUAGE_MODELS, {M130.name: 120_000_000})

    def test_decode_is_held_against_reading_the_weights(self):
        # 120 MB at 40 GB/s are 3 ms, of 4 ms.
        read, slower = [1 / 40e9] * 2, [1 / 39e9] * 2
        for probes in ({READ: read, REREAD: slower}, {READ: slower, REREAD: read}):
            (share,) = self.found({decode(1): probes})
            assert share.share == pytest.approx(0.75)
            assert share.roof_s == pytest.approx(0.003)
            assert share.parts["decoded_bytes"] == 120_000_000
            assert share.parts["read_bytes_per_s"] == pytest.approx(1 / probes[READ][0])
            assert share.parts["reread_bytes_per_s"] == pytest.approx(1 / probes[REREAD][0])
            assert share.parts["state_bytes"] == M130.state_bytes(1)

    def test_a_round_is_held_against_the_roof_of_its_own_moment(self):
        # Half as fast for two rounds of three: the share stays what it is.
        figure = decode(1)
        measured = {figure: {OURS: [0.004, 0.008, 0.008]}}
        read = [1 / 40e9, 1 / 20e9, 1 / 20e9]
        probed = {figure: {READ: read, REREAD: read}}
        (share,) = shares(measured, probed, LANGUAGE_MODELS, {M130.name: 120_000_000})
        assert share.share == pytest.approx(0.75)
        assert share.spread == pytest.approx((0.75, 0.75))

    def test_prefill_is_held_against_gemm_and_scan_of_the_same_round(self):
        operations = 2 * 512 * M130.layers * M130.linear_weights
        probed = {INT8: [0.06 / operations, 0.12 / operations], SCAN: [0.015 / 24, 0.03 / 24]}
        (share,) = self.found({prefill(512): probed})
        assert share.share == pytest.approx(0.75)
        assert share.parts == pytest.approx({"gemm_s": 0.09, "scan_s": 0.0225})

    def test_a_batch_scans_each_sequence(self):
        figure = prefill(128, batch=4)
        (share,) = shares(
            {figure: {OURS: [1.0, 1.0]}}, {figure: {INT8: [0.0], SCAN: [0.001]}}, LANGUAGE_MODELS, {}
        )  # fmt: skip
        assert share.roof_s == pytest.approx(4 * 24 * 0.001)

    def test_a_figure_that_ours_lacks_has_none(self):
        assert shares({}, {decode(1): {READ: [1.0], REREAD: [1.0]}}, LANGUAGE_MODELS, {}) == []
