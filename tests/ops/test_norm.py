"""rmsnorm_quantize, layernorm_quantize: one int8 step from the reference, properties, errors."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import inputs
from cases.norm import CASES
from mambaquant_ext import ops
from reference import norm as reference
from tolerances import assert_equal, assert_int8_close, assert_scales_close


def call_op(ops, subtract_mean, x, weight=None, bias=None, residual=None, scale=None, eps=1e-5):
    if subtract_mean:
        return ops.layernorm_quantize(x, weight, bias, residual, scale, eps)
    return ops.rmsnorm_quantize(x, weight, residual, scale, eps)


both_norms = pytest.mark.parametrize("subtract_mean", [False, True], ids=["rms", "layer"])


@both_norms
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_norm_quantize_matches_reference(case, subtract_mean, ops, generator):
    arguments = case.make(generator)
    if not subtract_mean:
        arguments["bias"] = None
    q, scale, residual = call_op(ops, subtract_mean, **arguments)
    expected_q, expected_scale, expected_residual = reference.norm_quantize(
        **arguments, subtract_mean=subtract_mean
    )
    assert_equal(residual, expected_residual)
    assert_scales_close(scale, expected_scale)
    assert_int8_close(q, expected_q)


@both_norms
@given(
    st.integers(1, 6),
    st.integers(1, 200),
    st.sampled_from(inputs.FLOAT_DTYPES),
    st.integers(0, 2**31),
)
def test_rows_are_independent_and_static_equals_dynamic(
    ops, subtract_mean, tokens, dim, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = inputs.with_outlier_channels((tokens, dim), generator, dtype)
    weight = inputs.normal((dim,), generator)
    bias = inputs.normal((dim,), generator) if subtract_mean else None
    residual = inputs.normal((tokens, dim), generator, dtype)
    q, scale, stored = call_op(ops, subtract_mean, x, weight, bias, residual)
    for t in range(tokens):
        row = slice(t, t + 1)
        alone = call_op(ops, subtract_mean, x[row], weight, bias, residual[row])
        assert torch.equal(alone[0], q[row])
        assert torch.equal(alone[1], scale[row])
        static = call_op(ops, subtract_mean, x[row], weight, bias, residual[row], scale[row])
        assert torch.equal(static[0], q[row])
    # What is normalised is what was stored, rounding included.
    again = call_op(ops, subtract_mean, stored, weight, bias)
    assert torch.equal(again[0], q)
    assert torch.equal(again[1], scale)


@both_norms
@given(st.integers(1, 100), st.integers(-20, 20), st.integers(0, 2**31))
def test_powers_of_two_and_signs_pass_through(ops, subtract_mean, dim, exponent, seed):
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += 1.0  # keeps the variance of one column from being 0
    x = torch.cat([x, -x[:, :1]], dim=1)
    q, scale, _ = call_op(ops, subtract_mean, x, eps=0.0)
    scaled_q, scaled_scale, _ = call_op(ops, subtract_mean, x * 2.0**exponent, eps=0.0)
    assert torch.equal(scaled_q, q)
    assert torch.equal(scaled_scale, scale)
    assert torch.equal(call_op(ops, subtract_mean, -x, eps=0.0)[0], -q)


def test_layernorm_ignores_a_shift_and_large_means_do_not_cancel(ops):
    """Integers with exact sums: the same bits after a shift, unlike with E[x^2] - mean^2."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(-8, 9, (4, 256), generator=generator).float()
    expected = ops.layernorm_quantize(x)
    for shift in (1.0, 4096.0, 16384.0):
        q, scale, _ = ops.layernorm_quantize(x + shift)
        assert_equal(q, expected[0])
        assert_equal(scale, expected[1])


def test_inputs_are_left_alone_and_outputs_are_new(generator):
    x = inputs.normal((3, 20), generator)
    residual = inputs.normal((3, 20), generator)
    before = x.clone(), residual.clone()
    _, _, stored = ops.rmsnorm_quantize(x, residual=residual)
    assert stored.data_ptr() not in (x.data_ptr(), residual.data_ptr())
    assert_equal(x, before[0])
    assert_equal(residual, before[1])


@both_norms
def test_traces_and_passes_opcheck(subtract_mean, generator):
    x = inputs.normal((4, 24), generator, torch.float16)
    weight = torch.ones(24)
    residual = inputs.normal((4, 24), generator)
    compiled = torch.compile(partial(call_op, ops), fullgraph=True, backend="aot_eager")
    for scale in (None, torch.tensor([0.02])):
        for given_residual in (None, residual):
            arguments = (subtract_mean, x, weight, None, given_residual, scale)
            for actual, expected in zip(
                compiled(*arguments), call_op(ops, *arguments), strict=True
            ):
                assert_equal(actual, expected)
            op = torch.ops.mambaquant
            if subtract_mean:
                torch.library.opcheck(
                    op.layernorm_quantize, (x, weight, weight, given_residual, scale, 1e-5)
                )
            else:
                torch.library.opcheck(op.rmsnorm_quantize, (x, weight, given_residual, scale, 1e-5))


X = torch.zeros(4, 6)


@both_norms
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X.double()}, TypeError, "expected x of dtype float32, float16 or bfloat16"),
        ({"x": X[0]}, ValueError, "expected x with 2 dimensions"),
        ({"x": X.T}, ValueError, "expected x with a contiguous last dimension"),
        (
            {"weight": torch.ones(5)},
            ValueError,
            r"expected weight of shape \(dim,\) = \[6\], got \[5\]",
        ),
        ({"weight": torch.ones(6).half()}, TypeError, "expected weight of dtype"),
        ({"weight": torch.ones(12)[::2]}, ValueError, "expected weight to be contiguous"),
        (
            {"residual": X.double()},
            TypeError,
            "expected residual of dtype float32, float16 or bfloat16",
        ),
        (
            {"residual": X[:3]},
            ValueError,
            r"expected residual of shape as x = \[4, 6\], got \[3, 6\]",
        ),
        ({"residual": torch.zeros(6, 4).T}, ValueError, "expected residual with a contiguous last"),
        (
            {"scale": torch.ones(4)},
            ValueError,
            r"expected scale of shape \(1,\) = \[1\], got \[4\]",
        ),
        ({"eps": -1.0}, ValueError, "expected eps >= 0, got -1"),
        ({"eps": float("nan")}, ValueError, "expected eps >= 0, got nan"),
    ],
)
def test_bad_arguments_are_named(subtract_mean, arguments, error, message):
    name = "layernorm_quantize" if subtract_mean else "rmsnorm_quantize"
    with pytest.raises(error, match=f"{name}: {message}"):
        call_op(ops, subtract_mean, **{"x": X, **arguments})


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.ones(7), ValueError, r"expected bias of shape \(dim,\) = \[6\], got \[7\]"),
        (torch.ones(6, dtype=torch.int32), TypeError, "expected bias of dtype"),
    ],
)
def test_bad_bias_is_named(bias, error, message):
    with pytest.raises(error, match=message):
        ops.layernorm_quantize(X, bias=bias)
