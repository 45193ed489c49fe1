"""Rows of ours and a peer."""

import pytest
from bench.cpu.bars import PEER
from bench.cpu.engines import OURS
from bench.cpu.rows import model_rows
from tests.bench.cpu.samples import decode, samples_of


class TestRows:
    def test_ratios_are_of_the_rounds_that_both_took(self):
        row = next(r for r in model_rows(samples_of()) if r["peer_name"] == PEER)
        assert row["figure"] == "prefill mamba-130m, 2 threads, batch 1, 512 tokens"
        assert row["ratio"] == pytest.approx(8.0)
        assert row["ours"] == pytest.approx((5120 + 2560) / 2)
        assert row["unit"] == "tokens/s"
        assert row["spread"]["ratio"] == pytest.approx((8.0, 8.0))
        assert row["timings"][OURS]["best_us"] == pytest.approx(1e5)

    def test_a_figure_without_a_peer_has_a_row(self):
        (row,) = (r for r in model_rows(samples_of()) if r["shape"] == decode(8).shape)
        assert row["peer_name"] is row["peer"] is row["ratio"] is None
        assert row["ours"] == pytest.approx(1000)

    def test_without_ours_there_is_nothing_to_compare(self):
        assert model_rows({decode(1): {PEER: [1.0, 1.0]}}) == []
