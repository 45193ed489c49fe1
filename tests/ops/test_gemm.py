"""gemm, gemm_dequantize, gemm_requantize: exact against the reference, properties, errors."""

import hashlib
import json
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mambaquant_ext
from cases import inputs
from cases.gemm import CASES, KERNEL_CASES
from mambaquant_ext import _C, ops
from mambaquant_ext._load import gemm_packing, packed_gemm_weight_bytes
from reference import gemm as reference
from tolerances import assert_equal

named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@named
def test_gemm_equals_reference(case, ops, generator):
    a, weight = case.operands(generator)
    assert_equal(ops.gemm(a, *ops.pack_gemm_weight(weight), case.n), reference.gemm(a, weight))


@named
def test_gemm_dequantize_equals_reference(case, ops, generator):
    a, weight = case.operands(generator)
    given = case.scales(generator)
    del given["out_scale"], given["out_zero_point"]
    assert_equal(
        ops.gemm_dequantize(a, *ops.pack_gemm_weight(weight), **given, dtype=case.dtype),
        reference.gemm_dequantize(a, weight, **given, dtype=case.dtype),
    )


@named
def test_gemm_requantize_equals_reference(case, ops, generator):
    a, weight = case.operands(generator)
    given = case.scales(generator)
    del given["residual"]
    q = ops.gemm_requantize(a, *ops.pack_gemm_weight(weight), **given)
    assert_equal(q, reference.gemm_requantize(a, weight, **given))


def test_sums_are_exact_up_to_the_largest_k(ops):
    """128 * 127 * 131072 = 2^31 - 2^24: one step of K more would not fit."""
    k = 131072
    a = torch.full((2, k), -128, dtype=torch.int8)
    a[1] = 127
    weight = torch.full((3, k), 127, dtype=torch.int8)
    weight[1] = -127
    acc = ops.gemm(a, *ops.pack_gemm_weight(weight), 3)
    assert_equal(acc, reference.gemm(a, weight))
    assert int(acc[0, 1]) == 128 * 127 * k


def test_a_negative_zero_keeps_its_sign_without_bias(ops):
    a, weight = torch.zeros(1, 4, dtype=torch.int8), torch.ones(1, 4, dtype=torch.int8)
    value = ops.gemm_dequantize(
        a, *ops.pack_gemm_weight(weight), torch.tensor([-1.0]), torch.ones(1)
    )
    assert torch.signbit(value).all()


def test_a_row_does_not_depend_on_the_others(ops, generator):
    """Every M from 1 to 30, hence each count of rows in a tile, gives the rows of M = 30."""
    m, n, k = 30, 45, 130
    a, weight = inputs.int8((m, k), generator), inputs.int8((n, k), generator)
    a_scale, b_scale = inputs.positive((m,), generator), inputs.positive((n,), generator)
    packed = ops.pack_gemm_weight(weight)
    whole = ops.gemm_dequantize(a, *packed, a_scale, b_scale)
    whole_q = ops.gemm_requantize(a, *packed, a_scale, b_scale, b_scale * 50)
    for first in range(m):
        rows = slice(first, m)
        assert_equal(ops.gemm_dequantize(a[rows], *packed, a_scale[rows], b_scale), whole[rows])
        q = ops.gemm_requantize(a[rows], *packed, a_scale[rows], b_scale, b_scale * 50)
        assert_equal(q, whole_q[rows])


def test_threads_do_not_change_the_result(ops, generator):
    a, weight = inputs.int8((300, 257), generator), inputs.int8((500, 257), generator)
    packed = ops.pack_gemm_weight(weight)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(ops.gemm(a, *packed, 500))
    finally:
        torch.set_num_threads(threads)
    for result in results:
        assert_equal(result, reference.gemm(a, weight))


sizes = st.tuples(st.integers(1, 30), st.integers(1, 70), st.integers(1, 140))


@given(sizes, st.integers(0, 2**31), st.integers(-100, 100))
def test_zero_point_is_what_acc_offset_takes_away(ops, size, seed, zero_point):
    """The product of shifted activations, corrected, equals the product of the plain ones."""
    generator = torch.Generator().manual_seed(seed)
    m, n, k = size
    q = torch.randint(-28, 28, (m, k), generator=generator)
    weight = inputs.int8((n, k), generator)
    packed = ops.pack_gemm_weight(weight)
    a_scale, b_scale = torch.tensor([0.37]), inputs.positive((n,), generator)
    offset = (zero_point * weight.int().sum(1)).to(torch.int32)
    shifted = (q + zero_point).to(torch.int8)
    assert_equal(
        ops.gemm_dequantize(shifted, *packed, a_scale, b_scale, offset),
        ops.gemm_dequantize(q.to(torch.int8), *packed, a_scale, b_scale),
    )


@given(sizes, st.integers(0, 2**31))
def test_rows_columns_and_signs_permute(ops, size, seed):
    generator = torch.Generator().manual_seed(seed)
    m, n, k = size
    a, weight = inputs.int8((m, k), generator), inputs.int8((n, k), generator)
    acc = ops.gemm(a, *ops.pack_gemm_weight(weight), n)
    rows, columns = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)
    depth = torch.randperm(k, generator=generator)
    moved = ops.gemm(a[rows][:, depth], *ops.pack_gemm_weight(-weight[columns][:, depth]), n)
    assert_equal(moved, -acc[rows][:, columns])


def can_be_forced(kernel):
    try:
        _C.force_gemm_path(kernel)
    except ValueError:
        return False
    _C.force_gemm_path("auto")
    return True


@contextmanager
def forced_kernel(name, splits=0):
    if not can_be_forced(name):
        pytest.skip(f"this device or build has no {name}")
    _C.force_gemm_path(name, splits)
    try:
        yield
    finally:
        _C.force_gemm_path("auto")


on_cuda = pytest.mark.parametrize("ops", ["cudasim", "cuda"], indirect=True)
# Names for force_gemm_path, splits of K, and what the name of the kernel holds.
KERNELS = (
    ("gemv", 0, "gemm_small_kernel"),
    ("128x256x64", 0, "gemm_tile_kernelILi0E"),
    ("128x128x64", 0, "gemm_tile_kernelILi1E"),
    ("64x128x64", 1, "gemm_tile_kernelILi2E"),
    ("64x128x64", 3, "gemm_tile_kernelILi2E"),
    ("64x64x128", 1, "gemm_tile_kernelILi3E"),
    ("64x64x128", 2, "gemm_tile_kernelILi3E"),
    ("32x64x128", 1, "gemm_tile_kernelILi4E"),
    ("32x64x128", 8, "gemm_tile_kernelILi4E"),
    ("sm90", 0, "GemmUniversal"),
)


def last_kernel(ops):
    """The mangled name of the kernel that ran last; on a GPU nobody records it."""
    return json.loads(_C.simulator_stats())[-1]["kernel"] if ops.name == "cudasim" else None


@on_cuda
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel[0]}-split{kernel[1]}")
def test_every_cuda_kernel_equals_reference(kernel, ops, generator):
    name, splits, symbol = kernel
    with forced_kernel(name, splits):
        for case in KERNEL_CASES:
            a, weight = case.operands(generator)
            packed = ops.pack_gemm_weight(weight)
            assert_equal(ops.gemm(a, *packed, case.n), reference.gemm(a, weight))
            ran = last_kernel(ops)
            assert ran is None or symbol in ran
            scales = case.scales(generator)
            value = {k: v for k, v in scales.items() if k not in ("out_scale", "out_zero_point")}
            assert_equal(
                ops.gemm_dequantize(a, *packed, **value, dtype=case.dtype),
                reference.gemm_dequantize(a, weight, **value, dtype=case.dtype),
            )
            del scales["residual"]
            assert_equal(
                ops.gemm_requantize(a, *packed, **scales),
                reference.gemm_requantize(a, weight, **scales),
            )


@on_cuda
@pytest.mark.parametrize("kernel", ["gemv", "64x64x128", "sm90"])
def test_rows_that_overlap(kernel, ops, generator):
    """Rows of an expanded tensor: the distance from one to the next is 0, or less than K."""
    weight = inputs.int8((40, 64), generator)
    row = inputs.int8((1, 64), generator)
    line = inputs.int8((64 + 16 * 4,), generator)
    packed = ops.pack_gemm_weight(weight)
    for a in (row.expand(5, 64), line.as_strided((5, 64), (16, 1))):
        with forced_kernel(kernel):
            if kernel == "sm90":
                with pytest.raises(NotImplementedError, match="rows of a that do not overlap"):
                    ops.gemm(a, *packed, 40)
                continue
            assert_equal(ops.gemm(a, *packed, 40), reference.gemm(a, weight))


def test_int8_results_at_halves_and_beyond_the_range(ops):
    """Ties, infinities, NaN, and zero points up to some that int8 has no use for."""
    a = torch.arange(-70, 70, dtype=torch.int8)[:, None]
    weight = torch.tensor([[1], [-1], [3], [127]], dtype=torch.int8)
    packed = ops.pack_gemm_weight(weight)
    for scale in (0.5, 1.5, 1e30, torch.inf, torch.nan):
        for zero_point in (None, 0, 1, -128, 127, 300, -40000):
            scales = {
                "a_scale": torch.tensor([scale]),
                "b_scale": torch.ones(4),
                "out_scale": torch.ones(4),
                "out_zero_point": None,
            }
            if zero_point is not None:
                scales["out_zero_point"] = torch.full((4,), zero_point, dtype=torch.int32)
            assert_equal(
                ops.gemm_requantize(a, *packed, **scales),
                reference.gemm_requantize(a, weight, **scales),
            )


@on_cuda
def test_the_kernel_chosen_fits_the_device(ops):
    """Few rows: the weight is read once. Many: on Hopper wgmma, elsewhere mma.sync."""
    assert _C.plan_gemm(1, 5120, 2560)[0] == "gemv"
    assert _C.plan_gemm(16, 5120, 2560)[0] == "gemv"
    name, splits, workspace_bytes = _C.plan_gemm(32, 192, 5120)
    assert name == "32x64x128"
    assert splits > 1
    assert workspace_bytes >= splits * 32 * 192 * 4
    many = _C.plan_gemm(4096, 10240, 2560)[0]
    if can_be_forced("sm90"):
        assert many == "sm90"
        return
    assert many == "128x256x64"
    with pytest.raises(ValueError, match=r"compute capability 9\.0|no kernels for sm_90a"):
        _C.force_gemm_path("sm90")


@on_cuda
@pytest.mark.parametrize(
    ("name", "splits", "message"),
    [
        ("sm70", 0, "expected one of auto, gemv, sm80, sm90, 128x256x64, .*, got 'sm70'"),
        ("gemv", 2, "expected splits from 1 to 8, with a tile that can be split"),
        ("128x128x64", 2, "expected splits from 1 to 8, with a tile that can be split"),
        ("64x64x128", 9, "expected splits from 1 to 8, with a tile that can be split"),
        ("64x64x128", -1, "expected splits of at least 0"),
    ],
)
def test_a_kernel_that_cannot_be_forced_is_named(name, splits, message, ops):
    with pytest.raises(ValueError, match=message):
        _C.force_gemm_path(name, splits)
    assert _C.plan_gemm(1, 64, 64)[0] == "gemv"  # nothing is forced


@on_cuda
def test_a_k_whose_sums_could_overflow_is_refused(ops):
    layout = ops.pack_gemm_weight(W)[1]
    with pytest.raises(NotImplementedError, match="K of at most 131072"):
        ops.pack_gemm_weight(deep(131073))
    with pytest.raises(NotImplementedError, match="K of at most 131072"):
        ops.gemm(deep(131073), deep(32 * 131088)[0], layout, 1)
    with pytest.raises(NotImplementedError, match="K of at most 65536 with acc_offset"):
        ops.gemm_dequantize(
            deep(65537), deep(32 * 65552)[0], layout, ONE, ONE, torch.ones(1, dtype=torch.int32)
        )


@on_cuda
def test_a_packing_between_vectors_is_refused(ops, generator):
    packed, layout = ops.pack_gemm_weight(inputs.int8((32, 64), generator))
    shifted = torch.cat([packed[:1], packed])[1:]
    with pytest.raises(NotImplementedError, match="packed to start at a multiple of 16 bytes"):
        ops.gemm(inputs.int8((3, 64), generator), shifted, layout, 32)


# By instruction set and version: what a packing of that version is, for a weight with tails in both directions.
PACKINGS = {
    ("scalar", 1): "c00a9a02f71b2b276785cba51a846d5b7962e16d0dfede8a829e3a670e6e9f30",
    ("avx2", 1): "6de7bb5973ac885391b972ab0506a4ea1a1aff65db92e4ae35fb50780ea6641b",
    ("avx512_vnni", 1): "91a796de94bc5086256a505fa1604aad7dd8a70016d50f68cfef79d414f5662b",
}


def test_a_packing_keeps_its_bytes_as_long_as_its_version(isa):
    """Files hold packed weights: where this fails, raise kPackingVersion (csrc/cpu/gemm_micro.h) and add a row."""
    weight = (torch.arange(33 * 70) * 37 % 255 - 127).to(torch.int8).view(33, 70)
    packed, layout = ops.pack_gemm_weight(weight)
    packing = gemm_packing()
    assert (packing.isa, packing.layout) == (isa, layout)
    assert packed.numel() == packed_gemm_weight_bytes(33, 70)
    assert hashlib.sha256(packed.numpy()).hexdigest() == PACKINGS[isa, packing.version]


def test_a_layout_of_another_isa_is_refused():
    names = mambaquant_ext.supported_isas()
    if len(names) == 1:
        pytest.skip("this processor runs one instruction set only")
    a, weight = torch.ones(2, 8, dtype=torch.int8), torch.ones(3, 8, dtype=torch.int8)
    with mambaquant_ext.forced_isa(names[-1]):
        packed = ops.pack_gemm_weight(weight)
    with mambaquant_ext.forced_isa(names[0]):
        message = rf"expected layout 0 \(scalar.* got .*{names[-1]}.*pack the weight again"
        for call in (
            lambda: ops.gemm(a, *packed, 3),
            lambda: ops.gemm_dequantize(a, *packed, ONE, THREE),
            lambda: ops.gemm_requantize(a, *packed, ONE, THREE, THREE),
        ):
            with pytest.raises(NotImplementedError, match=message):
                call()


A = torch.zeros(4, 6, dtype=torch.int8)
W = torch.ones(3, 6, dtype=torch.int8)
PACKED, LAYOUT = ops.pack_gemm_weight(W)
ONE, THREE = torch.ones(1), torch.ones(3)


def deep(k):
    return torch.zeros(1, k, dtype=torch.int8)


def dequantize(a=A, packed=PACKED, layout=LAYOUT, a_scale=ONE, b_scale=THREE, **given):
    return ops.gemm_dequantize(a, packed, layout, a_scale, b_scale, **given)


def requantize(out_scale=THREE, **given):
    return ops.gemm_requantize(A, PACKED, LAYOUT, ONE, THREE, out_scale, **given)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pack_gemm_weight(W.float()), TypeError, "expected weight of dtype"),
        (lambda: ops.pack_gemm_weight(W[0]), ValueError, "expected weight with 2 dimensions"),
        (lambda: ops.pack_gemm_weight(W.T), ValueError, "expected weight with a contiguous last"),
        (lambda: ops.pack_gemm_weight(W - 129), ValueError, r"\[-127, 127\], got -128"),
        (lambda: ops.pack_gemm_weight(deep(131073)), NotImplementedError, "K of at most 131072"),
        (lambda: ops.gemm(A.float(), PACKED, LAYOUT, 3), TypeError, "expected a of dtype"),
        (lambda: ops.gemm(A[0], PACKED, LAYOUT, 3), ValueError, "expected a with 2 dimensions"),
        (lambda: ops.gemm(A.T, PACKED, LAYOUT, 3), ValueError, "expected a with a contiguous last"),
        (lambda: ops.gemm(A, PACKED, 9, 3), NotImplementedError, r"got 9 \(unknown\)"),
        (lambda: ops.gemm(A, PACKED, LAYOUT, -1), ValueError, "expected n of at least 0, got -1"),
        (lambda: ops.gemm(A, PACKED.float(), LAYOUT, 3), TypeError, "expected packed of dtype"),
        (lambda: ops.gemm(A, PACKED[None], LAYOUT, 3), ValueError, "expected packed with 1 dim"),
        (lambda: ops.gemm(A, PACKED, LAYOUT, 33), ValueError, r"1024 bytes.*\(33, 6\), got 512"),
        (
            lambda: ops.gemm(A.repeat(1, 3), PACKED, LAYOUT, 3),
            ValueError,
            r"1024 bytes.*\(3, 18\), got 512",
        ),
        (
            lambda: ops.gemm(A, PACKED.repeat(2)[::2], LAYOUT, 3),
            ValueError,
            "expected packed to be contiguous",
        ),
        (
            lambda: ops.gemm(deep(131073), deep(32 * 131088)[0], LAYOUT, 1),
            NotImplementedError,
            "K of at most 131072",
        ),
        (
            lambda: dequantize(
                deep(65537), deep(32 * 65552)[0], b_scale=ONE, acc_offset=torch.ones(1).int()
            ),
            NotImplementedError,
            "K of at most 65536 with acc_offset",
        ),
        (lambda: dequantize(b_scale=THREE[None]), ValueError, "expected b_scale with 1 dim"),
        (lambda: dequantize(b_scale=THREE.double()), TypeError, "expected b_scale of dtype"),
        (
            lambda: dequantize(a_scale=THREE),
            ValueError,
            r"expected a_scale of shape.*\[4\], got \[3\]",
        ),
        (lambda: dequantize(a_scale=ONE.half()), TypeError, "expected a_scale of dtype"),
        (lambda: dequantize(acc_offset=THREE), TypeError, "expected acc_offset of dtype"),
        (lambda: dequantize(bias=ONE), ValueError, r"expected bias of shape.*\[3\], got \[1\]"),
        (lambda: dequantize(residual=A), TypeError, "expected residual of dtype float32"),
        (lambda: dequantize(residual=torch.ones(4, 4)), ValueError, "expected residual of shape"),
        (
            lambda: dequantize(residual=torch.ones(3, 4).T),
            ValueError,
            "expected residual with a cont",
        ),
        (lambda: dequantize(dtype=torch.int8), TypeError, "expected dtype of dtype float32"),
        (lambda: requantize(ONE), ValueError, r"expected out_scale of shape.*\[3\], got \[1\]"),
        (lambda: requantize(out_zero_point=THREE), TypeError, "expected out_zero_point of dtype"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_opcheck(generator):
    a, weight = inputs.int8((5, 7), generator), inputs.int8((9, 7), generator)
    library = torch.ops.mambaquant
    torch.library.opcheck(library.pack_gemm_weight, (weight,))
    packed = ops.pack_gemm_weight(weight)
    nine, offset = torch.ones(9), torch.ones(9, dtype=torch.int32)
    torch.library.opcheck(library.gemm, (a, *packed, 9))
    residual = torch.ones(5, 9, dtype=torch.bfloat16)
    for optional in ((None, None, None), (offset, nine, residual)):
        torch.library.opcheck(
            library.gemm_dequantize, (a, *packed, ONE, nine, *optional, torch.float16)
        )
    for offsets in ((None, None), (offset, nine)):
        given = (a, *packed, torch.ones(5), nine, *offsets, nine, offset)
        torch.library.opcheck(library.gemm_requantize, given)


def test_compiles_without_graph_breaks(generator):
    weight = inputs.int8((9, 7), generator)
    nine = torch.ones(9)

    def layer(a, weight):
        packed, layout = ops.pack_gemm_weight(weight)
        q = ops.gemm_requantize(a, packed, layout, ONE, nine, nine * 30)
        return ops.gemm_dequantize(q[:, :7], packed, layout, ONE, nine), ops.gemm(
            a, packed, layout, 9
        )

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5):
        a = inputs.int8((tokens, 7), generator)
        for actual, expected in zip(compiled(a, weight), layer(a, weight), strict=True):
            assert_equal(actual, expected)
