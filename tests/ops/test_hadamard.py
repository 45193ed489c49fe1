"""hadamard_transform, hadamard_quantize, and the matrices behind them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import gen_hadamard

from cases import inputs
from cases.hadamard import CASES
from mambaquant_ext import ops
from mambaquant_ext.ops import hadamard
from reference import hadamard as reference
from reference.quantize import quantize
from tolerances import assert_equal, assert_float_close, assert_int8_close, assert_scales_close

ALL_SIZES = [n for n in range(1, reference.MAX_SIZE + 1) if reference.base_order(n) is not None]
DENSE_SIZES = [n for n in ALL_SIZES if n <= 1024]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_the_committed_table_is_what_the_script_writes():
    assert gen_hadamard.HEADER.read_text() == gen_hadamard.render()


def test_sizes_and_their_errors():
    assert list(ops.supported_hadamard_sizes()) == ALL_SIZES
    assert hadamard.is_supported(5120)
    assert not hadamard.is_supported(34)
    for call in (
        lambda: ops.hadamard_matrix(34),
        lambda: ops.hadamard_transform(torch.zeros(1, 34)),
        lambda: ops.hadamard_quantize(torch.zeros(1, 34)),
    ):
        with pytest.raises(ValueError, match=r"nearest: 32 and 36\), got 34"):
            call()
    with pytest.raises(ValueError, match=r"nearest: 32768\), got 65536"):
        ops.hadamard_matrix(65536)
    with pytest.raises(ValueError, match=r"nearest: 1\), got 0"):
        ops.hadamard_transform(torch.zeros(2, 0))


@pytest.mark.parametrize("size", DENSE_SIZES)
def test_matrix_equals_reference_and_is_orthogonal(size):
    matrix = ops.hadamard_matrix(size)
    assert_equal(matrix, reference.matrix(size))
    entries = torch.round(matrix * size**0.5)
    assert torch.equal(entries @ entries.T, size * torch.eye(size, dtype=torch.float64))
    assert ops.hadamard_matrix(size, torch.float32).dtype == torch.float32


def test_reference_transform_is_the_dense_product(generator):
    for size in DENSE_SIZES:
        x = torch.randint(-9, 10, (2, size), generator=generator).double()
        entries = torch.round(reference.matrix(size) * size**0.5)
        assert torch.equal(reference.unnormalized(x), x @ entries)
        assert torch.equal(reference.unnormalized(x, inverse=True), x @ entries.T)


@pytest.mark.parametrize("inverse", [False, True])
def test_every_size_is_exact_on_integers(inverse, ops, generator):
    """Sums of small integers are exact in any order: equal bits, float32 1 / sqrt(n) included."""
    for size in ALL_SIZES:
        x = torch.randint(-9, 10, (2, size), generator=generator).float()
        sums = reference.unnormalized(x, inverse).float()
        norm = 1.0 / torch.tensor(float(size)).sqrt()
        assert_equal(ops.hadamard_transform(x, inverse), sums * norm)
        if not inverse:
            scale = torch.tensor([0.21])
            inv_scale = norm * (1.0 / scale)
            expected = torch.round(sums * inv_scale).clamp(-127, 127).to(torch.int8)
            assert_equal(ops.hadamard_quantize(x, scale)[0], expected)


@named
@pytest.mark.parametrize("inverse", [False, True])
def test_transform_matches_reference(case, inverse, ops, generator):
    x, _ = case.make(generator)
    expected = reference.transform(x, inverse)
    assert_float_close(ops.hadamard_transform(x, inverse), expected, expected.to(x.dtype))
    assert ops.hadamard_transform(x, inverse).dtype == x.dtype


@named
def test_quantize_matches_reference(case, ops, generator):
    x, scale = case.make(generator)
    q, scale_out = ops.hadamard_quantize(x, scale)
    expected_q, expected_scale = reference.hadamard_quantize(x, scale)
    assert_scales_close(scale_out, expected_scale)
    assert_int8_close(q, expected_q)


@given(
    st.sampled_from([n for n in ALL_SIZES if n <= 4096]), st.integers(1, 4), st.integers(0, 2**31)
)
def test_rotation_keeps_norms_and_inverts(ops, size, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    x = inputs.with_outlier_channels((tokens, size), generator)
    y = ops.hadamard_transform(x)
    norms = x.norm(dim=1)
    torch.testing.assert_close(y.norm(dim=1), norms)
    for there, back in ((y, True), (ops.hadamard_transform(x, True), False)):
        error = (ops.hadamard_transform(there, back) - x).abs().amax(dim=1)
        assert (error <= 1e-5 * norms).all()
    q, scale = ops.hadamard_quantize(x)
    assert q.abs().amax(dim=1).eq(127).all()
    for t in range(tokens):
        row = slice(t, t + 1)
        assert torch.equal(ops.hadamard_transform(x[row]), y[row])
        assert torch.equal(ops.hadamard_quantize(x[row])[0], q[row])
        assert torch.equal(ops.hadamard_quantize(x[row], scale[row])[0], q[row])


def test_threads_may_transform_rows_of_two_lengths_at_once(ops, generator):
    """One CUDA kernel serves both lengths, with 41 KB and with 82 KB of shared memory a block."""
    x = [torch.randint(-9, 10, (1, size), generator=generator).float() for size in (10240, 20480)]
    device = "cuda" if ops.name == "cuda" else "cpu"

    def transform_often(row):
        row = row.to(device)
        return [hadamard.hadamard_transform(row) for _ in range(700)][-1].cpu()

    with ops.active(), ThreadPoolExecutor(4) as threads:
        results = list(threads.map(transform_often, x * 2))
    for row, result in zip(x * 2, results, strict=True):
        norm = 1.0 / torch.tensor(float(row.numel())).sqrt()
        assert_equal(result, reference.unnormalized(row).float() * norm)


def test_quantize_is_the_transform_then_quantize(generator):
    """n = 4096 has an exact 1 / sqrt(n), so that the fused factor rounds as the two steps do."""
    x = inputs.with_outlier_channels((3, 4096), generator)
    q, scale = ops.hadamard_quantize(x)
    assert_equal(q, quantize(ops.hadamard_transform(x), scale, None, 0))


def test_traces_and_passes_opcheck(generator):
    x = inputs.normal((4, 24), generator, torch.float16)

    def both(x, scale):
        return ops.hadamard_transform(x), *ops.hadamard_quantize(x, scale)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for scale in (None, torch.tensor([0.02])):
        for actual, expected in zip(compiled(x, scale), both(x, scale), strict=True):
            assert_equal(actual, expected)
        torch.library.opcheck(torch.ops.mambaquant.hadamard_quantize, (x, scale))
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.mambaquant.hadamard_transform, (x, inverse))


X = torch.zeros(8, 12)


@pytest.mark.parametrize("op", [ops.hadamard_transform, ops.hadamard_quantize])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X.double(), TypeError, "expected x of dtype float32, float16 or bfloat16"),
        (X[0], ValueError, "expected x with 2 dimensions"),
        (X.T, ValueError, "expected x with a contiguous last dimension"),
    ],
)
def test_bad_x_is_named(op, x, error, message):
    with pytest.raises(error, match=f"{op.__name__}: {message}"):
        op(x)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (torch.ones(8), ValueError, r"expected scale of shape \(1,\) = \[1\], got \[8\]"),
        (torch.ones(1).half(), TypeError, "expected scale of dtype"),
    ],
)
def test_bad_scale_is_named(scale, error, message):
    with pytest.raises(error, match=message):
        ops.hadamard_quantize(X, scale)
