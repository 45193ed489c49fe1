"""Which figures there are, and what is too long or too large for whom."""

import pytest
from bench.cpu.engines import ENGINES, OURS
from bench.cpu.plan import PLANS, Figure, why_not
from bench.shapes import (
    LANGUAGE_MODELS,
    MORE_GEMM_TOKENS,
    PREFILL_TOKENS,
    LanguageShape,
    LayerShape,
)  # fmt: skip
from tests.bench.cpu.samples import M130, decode, prefill

FUSED, UNFUSED = ENGINES[OURS], ENGINES["mambapy float32"]


class TestShape:
    def test_parameters_are_those_of_the_name(self):
        assert [round(s.parameters / 1e6) for s in LANGUAGE_MODELS.values()] == [128, 369, 1368]

    def test_bytes_of_a_state(self):
        shape = LanguageShape(LayerShape("tiny", 4, 8, 1, dstate=2, width=3), layers=5)
        # 2 states of 8 channels in float32 and 2 inputs of 8 channels in int8, read and written.
        assert shape.state_bytes(3) == 2 * 3 * 5 * (2 * 8 * 4 + 2 * 8)


class TestPlan:
    def test_quick_has_what_the_bars_need(self):
        figures = [f for group in PLANS["quick"].groups(M130.name, 2) for f in group]
        assert {prefill(512), prefill(8192), decode(1), decode(8)} <= set(figures)

    def test_products_are_timed_at_every_length_of_their_bar(self):
        lengths = {*PREFILL_TOKENS["cpu"], *MORE_GEMM_TOKENS["cpu"]}
        assert lengths == {64, 128, 256, 512, 1024, 2048}
        assert not set(PREFILL_TOKENS["cpu"]) & set(MORE_GEMM_TOKENS["cpu"])  # none twice

    def test_names_of_figures(self):
        assert Figure("prefill", "m", 1, 4, 1).shape == "m, 1 thread, batch 4, 1 token"
        assert Figure("decode", "m", 2, 4, 1).shape == "m, 2 threads, batch 4"
        assert prefill(8192).shape == "mamba-130m, 2 threads, batch 1, 8,192 tokens"

    def test_figures_of_one_group_differ(self):
        for plan in PLANS.values():
            for group in plan.groups(M130.name, 1):
                assert len(set(group)) == len(group)

    @pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [2, 1]), (64, [2, 1])])
    def test_thread_counts(self, cores, counts):
        assert PLANS["full"].thread_counts(cores) == counts
        assert PLANS["quick"].thread_counts(cores) == counts[:1]

    def test_what_would_take_too_long_is_left_out(self):
        def why(known, tokens=512):
            return why_not(prefill(tokens), FUSED, M130, 1 << 40, known, longest_sample_s=5.0)

        assert why({128: 1.0}) is None
        assert why({128: 1.5}) == "a sample would take 6 s"
        assert why({128: 1.5, 512: 4.0}) is None  # measured, so that nothing is guessed
        assert why({1: 1.0}) is None  # a single token says nothing about a prompt's
        assert why({}) is None

    def test_an_unfused_scan_must_fit_in_memory(self):
        states = 4 * 512 * 1536 * 16

        def why(kind, available):
            return why_not(prefill(512), kind, M130, available, {}, 5.0)

        assert why(UNFUSED, 6 * states) is None
        assert why(UNFUSED, 6 * states - 1) == "its scan would hold 288 MiB"
        assert why(FUSED, 0) is None
