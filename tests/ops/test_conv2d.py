"""depthwise_conv2d_quantize: against the reference and torch's convolution, properties, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from cases import inputs
from cases.conv1d import ConvCase
from cases.conv2d import CASES, Conv2dCase
from mambaquant_ext import ops
from reference import conv2d as reference
from tolerances import assert_equal, assert_int8_close


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_reference(case, ops, generator):
    arguments = case.make(generator)
    q = ops.depthwise_conv2d_quantize(**arguments)
    assert_int8_close(q, reference.depthwise_conv2d_quantize(**arguments))
    assert q.is_contiguous()


def torch_sums(x, weight, stride):
    """(batch, out_height, out_width, dim), by torch's convolution in float64, exact below 2^53."""
    padding = (weight.shape[0] // 2, weight.shape[1] // 2)
    planes = x.permute(0, 3, 1, 2).double()
    taps = weight.permute(2, 0, 1)[:, None].double()
    sums = F.conv2d(planes, taps, stride=stride, padding=padding, groups=x.shape[3])
    return sums.permute(0, 2, 3, 1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (3, 7)])
def test_the_integer_sum_is_exact(kernel, stride, ops, generator):
    """Each position of the output in turn: the bias takes its sum back to 100 + channel % 20, where SiLU is the
    identity, so that every unit shows. The sizes of the output are those of torch's convolution."""
    dim = 200
    x, weight = inputs.int8((1, 6, 8, dim), generator), inputs.int8((*kernel, dim), generator)
    x[..., :16], weight[..., :16] = -128, 127
    sums = torch_sums(x, weight, stride)
    target = 100 + torch.arange(dim) % 20
    ones = torch.ones(dim)
    for i in range(sums.shape[1]):
        for j in range(sums.shape[2]):
            bias = (target - sums[0, i, j]).float()
            q = ops.depthwise_conv2d_quantize(x, ones, weight, ones, bias, ones, stride=stride)
            assert q.shape == sums.shape
            assert_equal(q[0, i, j].int(), target.int())


@pytest.mark.parametrize(("asymmetric", "qmin"), [(False, -127), (True, -128)])
def test_saturates_at_the_ends_of_the_grid(asymmetric, qmin, ops, generator):
    """SiLU goes down to -0.278, which is far below the grid of an out_scale of 0.0005."""
    arguments = Conv2dCase("", asymmetric=asymmetric).make(generator)
    arguments["out_scale"] = torch.full((33,), 0.0005)
    q = ops.depthwise_conv2d_quantize(**arguments)
    assert (int(q.min()), int(q.max())) == (qmin, 127)
    assert_int8_close(q, reference.depthwise_conv2d_quantize(**arguments))


def test_a_row_of_pixels_is_the_causal_conv(ops, generator):
    """Both operators have one epilogue: a kernel of one row gives the bits of the causal conv, shifted by one."""
    given = ConvCase("", seqlen=70, dim=40, width=3).make(generator)
    del given["initial_state"], given["reverse"], given["order"]
    expected, _ = ops.causal_conv1d_quantize(**given)
    given |= {"x": given["x"][:, None], "weight": given["weight"][None]}
    assert_equal(ops.depthwise_conv2d_quantize(**given)[:, 0, :-1], expected[:, 1:])


@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 70), st.sampled_from([3, 5, 7]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_stride_2_is_every_second_of_stride_1(ops, height, width, dim, size, seed):
    arguments = Conv2dCase("", 1, height, width, dim, (size, size)).make(seeded(seed))
    every = ops.depthwise_conv2d_quantize(**arguments)
    second = ops.depthwise_conv2d_quantize(**{**arguments, "stride": 2})
    assert_equal(second, every[:, ::2, ::2])


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 70), st.integers(0, 2**31))
def test_the_transposed_image_gives_the_transposed_result(ops, height, width, dim, seed):
    arguments = Conv2dCase("", 1, height, width, dim, (3, 7)).make(seeded(seed))
    q = ops.depthwise_conv2d_quantize(**arguments)
    turned = {**arguments, "weight": arguments["weight"].transpose(0, 1).contiguous()}
    turned["x"] = arguments["x"].transpose(1, 2)
    assert_equal(ops.depthwise_conv2d_quantize(**turned).transpose(1, 2), q)


def test_a_pixel_reaches_as_far_as_the_kernel(ops, generator):
    arguments = Conv2dCase("", 1, 20, 20, 48, (3, 5)).make(generator)
    before = ops.depthwise_conv2d_quantize(**arguments)
    arguments["x"] = arguments["x"].clone()
    arguments["x"][:, 9, 13] += 50
    after = ops.depthwise_conv2d_quantize(**arguments)
    rows, columns = (before != after).any(3)[0].nonzero().T
    assert (rows.unique().tolist(), columns.unique().tolist()) == ([8, 9, 10], [*range(11, 16)])


def test_batch_and_thread_invariance(ops, generator):
    arguments = Conv2dCase("", 5, 21, 16, 150, (7, 7)).make(generator)
    q = ops.depthwise_conv2d_quantize(**arguments)
    x = arguments.pop("x")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_equal(ops.depthwise_conv2d_quantize(x, **arguments), q)
    finally:
        torch.set_num_threads(threads)
    for b in range(5):
        assert_equal(ops.depthwise_conv2d_quantize(x[b : b + 1], **arguments), q[b : b + 1])


GOOD = Conv2dCase("", dim=6).make(seeded(1))
BAD = [
    ({"x": GOOD["x"].float()}, TypeError, "expected x of dtype"),
    ({"x": GOOD["x"][0]}, ValueError, "expected x with 4 dimensions"),
    ({"x": GOOD["x"].transpose(2, 3)}, ValueError, "expected x with a contiguous last dimension"),
    ({"weight": GOOD["weight"][0]}, ValueError, "expected weight with 3 dimensions"),
    (
        {"weight": GOOD["weight"][:2]},
        NotImplementedError,
        "expected weight of odd height and width from 1 to 7, got 2 x 3",
    ),
    ({"weight": GOOD["weight"].repeat(1, 3, 1)}, NotImplementedError, "from 1 to 7, got 3 x 9"),
    (
        {"weight": GOOD["weight"][..., :5]},
        ValueError,
        r"expected weight of shape \(kernel_height, kernel_width, dim\)",
    ),
    ({"weight": GOOD["weight"].float()}, TypeError, "expected weight of dtype"),
    (
        {"weight": GOOD["weight"].transpose(0, 1)},
        ValueError,
        "expected weight to be contiguous",
    ),
    ({"x_scale": torch.ones(5)}, ValueError, r"expected x_scale of shape \(dim,\)"),
    ({"weight_scale": torch.ones(5)}, ValueError, "expected weight_scale of shape"),
    ({"bias": torch.ones(6).double()}, TypeError, "expected bias of dtype"),
    ({"out_scale": torch.ones(5)}, ValueError, "expected out_scale of shape"),
    ({"out_zero_point": torch.ones(6)}, TypeError, "expected out_zero_point of dtype"),
    ({"stride": 3}, NotImplementedError, "expected stride 1 or 2, got 3"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.depthwise_conv2d_quantize(**{**GOOD, **change})


@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(stride, generator):
    arguments = Conv2dCase("", dim=6, stride=stride).make(generator)
    torch.library.opcheck(torch.ops.mambaquant.depthwise_conv2d_quantize, tuple(arguments.values()))


def test_traces_in_one_graph(generator):
    arguments = Conv2dCase("", dim=6, stride=2).make(generator)
    traced = torch.compile(ops.depthwise_conv2d_quantize, fullgraph=True, backend="aot_eager")
    assert_equal(traced(**arguments), ops.depthwise_conv2d_quantize(**arguments))
