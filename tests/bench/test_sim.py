"""bench.sim: ratios from counters, what is marked, and a case run in the simulator."""

from collections import Counter

import pytest
import torch

import backends
from bench import sim, sim_cases

COUNTERS = Counter(
    global_load_bytes=150, global_store_bytes=50, global_load_sectors=8, global_store_sectors=2,
    shared_load_wavefronts=12, shared_store_wavefronts=3, shared_load_wavefronts_ideal=8,
    shared_store_wavefronts_ideal=2, thread_instructions=700,
)  # fmt: skip


def case(**limits):
    return sim_cases.SimCase("quantize", "shape", lambda: None, 160, 100, limits)


def test_figures_are_ratios_to_the_ideal():
    figures = sim.figures_of(COUNTERS, case())
    assert figures == {"bytes": 1.25, "sectors": 2.0, "wavefronts": 1.5, "instructions": 7.0}
    assert sim.figures_of(Counter(), case())["wavefronts"] is None


def test_a_figure_beyond_its_limit_is_marked():
    row = {
        "op": "quantize", "shape": "s", "device": "a100", "limits": {"bytes": 1.2, "sectors": 3.0},
        "figures": sim.figures_of(COUNTERS, case()), "launches": [{"kernel": "k"}],
    }  # fmt: skip
    assert sim.cells(row)[3:7] == ["1.250 !", "2.000", "1.500", "7.000"]


def test_bytes_count_every_tensor_once():
    x = torch.zeros(3, 5)
    assert sim_cases.nbytes({"x": x, "axis": 0}, (x.half(), None)) == 60 + 30


def test_every_operator_that_runs_in_a_model_has_a_case():
    assert set(sim_cases.GROUPS) == {
        "quantize", "norm", "hadamard", "conv1d", "conv2d", "selective_scan", "gemm"
    }  # fmt: skip


def test_a_case_in_cudasim():
    reason = backends.reason_to_skip("cudasim")
    if reason:
        pytest.skip(reason)
    x = torch.randn(64, 256)
    wanted = sim_cases.nbytes(x) + x.numel() + 4
    with backends.Backend("cudasim").active():
        made = sim_cases._case(
            "quantize", "64x256", {"x": x, "scale": torch.tensor([0.1])}, x.numel(), {"bytes": 1.05}
        )
        assert made.ideal_bytes == wanted
        row = sim.run_case(made, "a100")
    assert row["is_within_limits"]
    assert row["figures"]["bytes"] == pytest.approx(1.0, abs=0.05)
    assert row["launches"][0]["kernel"].startswith("scale_rows_kernel")
