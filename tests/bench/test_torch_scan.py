"""The scans that ours is timed beside compute what the operator does."""

import pytest
import torch
from bench.harness import EAGER
from bench.ops.selective_scan import prefill_case
from bench.ops.torch_scan import UNROLLED, advance, looped, parallel
from bench.shapes import LayerShape

SHAPE = LayerShape("tiny", 4, 6, 2, dstate=3)


def inputs(tokens):
    generator = torch.Generator().manual_seed(0)
    dt, dtx = torch.rand(2, tokens, 6, generator=generator)
    B, C = torch.randn(2, tokens, 3, 1, generator=generator)
    return -torch.rand(3, 6, generator=generator), dt, dtx, B, C


def by_loop(A, dt, dtx, B, C):
    """The recurrence in float64, element by element of time."""
    state, ys = torch.zeros(3, 6, dtype=torch.float64), []
    for t in range(len(dt)):
        state = torch.exp(dt[t].double() * A.double()) * state + dtx[t].double() * B[t].double()
        ys.append((state * C[t].double()).sum(0))
    return torch.stack(ys)


@pytest.mark.parametrize("tokens", [1, UNROLLED, 2 * UNROLLED + 1])
def test_the_loop_is_the_recurrence(tokens):
    found = looped(*inputs(tokens), advance)
    torch.testing.assert_close(found.double(), by_loop(*inputs(tokens)), rtol=1e-5, atol=1e-5)


def test_a_parallel_scan_gets_decays_and_inputs_of_every_state():
    def pscan(decay, added):
        states = torch.zeros_like(added)
        for t in range(added.shape[1]):
            before = states[:, t - 1] if t else 0
            states[:, t] = decay[:, t] * before + added[:, t]
        return states

    found = parallel(pscan, *inputs(7))
    torch.testing.assert_close(found.double(), by_loop(*inputs(7)), rtol=1e-5, atol=1e-5)


def test_the_whole_operator_is_that_of_the_kernel():
    torch.manual_seed(0)
    case = prefill_case(SHAPE, 5, "float", "quick")
    expected = case.run()[0][0]
    torch.testing.assert_close(case.baselines[EAGER](), expected, rtol=1e-4, atol=1e-5)


def test_compiled_code_is_an_option(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function, dynamic: function)
    torch.manual_seed(0)
    assert {EAGER, "torch.compile"} <= set(prefill_case(SHAPE, 5, "float", "cpu").baselines)
    assert "torch.compile" not in prefill_case(SHAPE, 5, "float", "quick").baselines
