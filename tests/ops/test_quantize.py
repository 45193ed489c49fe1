"""quantize, quantize_dynamic, dequantize: exact against the reference, properties, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import inputs
from cases.quantize import CASES
from mambaquant_ext import ops
from reference import quantize as reference
from tolerances import assert_equal

named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@named
def test_quantize_equals_reference(case, ops, generator):
    x, scale, zero_point = case.make(generator)
    assert_equal(
        ops.quantize(x, scale, zero_point, case.axis),
        reference.quantize(x, scale, zero_point, case.axis),
    )


@named
def test_quantize_dynamic_equals_reference(case, ops, generator):
    x, _, _ = case.make(generator)
    q, scale = ops.quantize_dynamic(x, case.axis)
    expected_q, expected_scale = reference.quantize_dynamic(x, case.axis)
    assert_equal(scale, expected_scale)
    assert_equal(q, expected_q)


@named
def test_dequantize_equals_reference(case, ops, generator):
    x, scale, zero_point = case.make(generator)
    q = inputs.int8(case.shape, generator)
    q = inputs.offset_view(q) if case.offset else q
    assert_equal(
        ops.dequantize(q, scale, zero_point, case.axis, x.dtype),
        reference.dequantize(q, scale, zero_point, case.axis, x.dtype),
    )


@pytest.mark.parametrize("dtype", inputs.FLOAT_DTYPES)
def test_every_half_bit_pattern_quantizes_alike(dtype, ops):
    """Conversion from float16 and bfloat16 is exact for all 65,536 patterns, NaN included."""
    if dtype == torch.float32:
        bits = torch.arange(0, 2**32, 65521, dtype=torch.int64).to(torch.int32)
    else:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(dtype).reshape(1, -1)
    scale = torch.tensor([0.01])
    assert_equal(ops.quantize(x, scale), reference.quantize(x, scale))


@given(st.integers(1, 9), st.integers(1, 70), st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_error_is_at_most_half_a_step_and_sign_symmetric(ops, tokens, dim, spread, seed):
    x = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed)) * spread
    q, scale = ops.quantize_dynamic(x, 0)
    assert ((ops.dequantize(q, scale, None, 0) - x).abs() <= scale[:, None] * 0.5001).all()
    assert torch.equal(ops.quantize(-x, scale, None, 0), -q)
    assert torch.equal(ops.quantize(ops.dequantize(q, scale, None, 0), scale, None, 0), q)
    permutation = torch.randperm(tokens)
    assert torch.equal(ops.quantize(x[permutation], scale[permutation], None, 0), q[permutation])


def test_zero_is_exact_with_any_zero_point(ops):
    x, scale = torch.zeros(2, 50), torch.tensor([0.3])
    for zero_point in (-128, -1, 0, 77, 127):
        zero = torch.tensor([zero_point], dtype=torch.int32)
        q = ops.quantize(x, scale, zero)
        assert (q == zero_point).all()
        assert (ops.dequantize(q, scale, zero) == 0).all()


X = torch.zeros(4, 6)
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.quantize(X.double(), ONE),
            TypeError,
            "expected x of dtype float32, float16 or bfloat16",
        ),
        (lambda: ops.quantize(X[0], ONE), ValueError, "expected x with 2 dimensions"),
        (lambda: ops.quantize(X.T, ONE), ValueError, "expected x with a contiguous last dimension"),
        (lambda: ops.quantize(X, ONE, None, 2), ValueError, r"expected axis None .* got 2"),
        (
            lambda: ops.quantize(X, torch.ones(2)),
            ValueError,
            r"expected scale of shape .* \[1\], got \[2\]",
        ),
        (
            lambda: ops.quantize(X, torch.ones(4), None, 1),
            ValueError,
            r"expected scale of shape .* \[6\], got \[4\]",
        ),
        (lambda: ops.quantize(X, ONE.double()), TypeError, "expected scale of dtype"),
        (lambda: ops.quantize(X, ONE, torch.ones(1)), TypeError, "expected zero_point of dtype"),
        (
            lambda: ops.quantize(X, torch.ones(8)[::2], None, 0),
            ValueError,
            "expected scale to be contiguous",
        ),
        (lambda: ops.quantize_dynamic(X.int()), TypeError, "expected x of dtype"),
        (lambda: ops.dequantize(X, ONE), TypeError, "expected q of dtype"),
        (
            lambda: ops.dequantize(X.to(torch.int8), ONE, dtype=torch.int8),
            TypeError,
            "expected dtype of dtype float32",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_opcheck(axis, generator):
    x = inputs.normal((4, 6), generator, torch.float16)
    scale = torch.ones(1 if axis is None else x.shape[axis])
    zero_point = torch.zeros(scale.shape, dtype=torch.int32)
    torch.library.opcheck(torch.ops.mambaquant.quantize, (x, scale, zero_point, axis))
    torch.library.opcheck(torch.ops.mambaquant.quantize_dynamic, (x, axis))
    q = ops.quantize(x, scale, None, axis)
    torch.library.opcheck(
        torch.ops.mambaquant.dequantize, (q, scale, zero_point, axis, torch.float16)
    )
