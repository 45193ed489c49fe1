"""The bars, each measured as it says."""

import pytest
from bench.cpu.bars import bars
from bench.cpu.probes import READ, REREAD
from bench.cpu.shares import shares
from bench.shapes import LANGUAGE_MODELS
from tests.bench.cpu.samples import KERNELS, M130, decode, samples_of


class TestBars:
    def measured(self, kernels=KERNELS, probed=None, **changed):
        samples = samples_of(**changed)
        read = [1 / 40e9, 1 / 40e9]
        probes = {decode(1): {READ: read, REREAD: read}} if probed is None else probed
        found = shares(samples, probes, LANGUAGE_MODELS, {M130.name: 120_000_000})
        return {bar.figure: bar for bar in bars(samples, found, kernels)}

    def test_each_is_measured_as_it_says(self):
        found = self.measured()
        values = {figure: bar.measured for figure, bar in found.items()}
        assert values == {
            "prefill over llama.cpp": pytest.approx(8.0),
            "prefill, share of GEMM and scan": None,
            "decode, share of read bandwidth": pytest.approx(0.75),
            "decode over llama.cpp": pytest.approx(1.5),
            "decode, tokens/s of batch 8 over 1": pytest.approx(4.0),
            "prefill, tokens/s of 8,192 over 512": pytest.approx(1.0),
            "int8 GEMM with epilogue over torch._int_mm": 0.9,
            "selective scan over the best of torch": 12.0,
        }

    def test_reached_or_not_or_unknown(self):
        found = self.measured()
        assert found["prefill over llama.cpp"].reached is True
        assert found["decode, share of read bandwidth"].reached is False
        assert found["prefill, share of GEMM and scan"].reached is None

    def test_the_worst_product_is_named(self):
        detail = self.measured()["int8 GEMM with epilogue over torch._int_mm"].detail
        assert detail == "the worst: mamba-130m x_proj 512x80x1536; 1 of 2 rows reach it"

    def test_nothing_measured_is_no_failure(self):
        assert all(bar.reached is None for bar in bars({}, [], []))
