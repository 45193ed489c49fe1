"""Every operator gives the same bits wherever its inputs lie, and to each row or sequence what it gives it alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import inputs
from cases.conv1d import ConvCase
from cases.conv2d import Conv2dCase
from cases.gemm import GemmCase
from cases.hadamard import HadamardCase
from cases.norm import NormCase
from cases.quantize import QuantizeCase
from cases.selective_scan import ScanCase, with_int8_readout
from tolerances import assert_equal

IN_SEQUENCE = 10**6  # a chunk_size that no sequence here reaches

dtypes = st.sampled_from(inputs.FLOAT_DTYPES)
maybe_dtypes = st.sampled_from([None, *inputs.FLOAT_DTYPES])
operand_dtypes = st.sampled_from([torch.int8, *inputs.FLOAT_DTYPES])
rows = st.integers(1, 4)
# Short rows of any length, and multiples of each vector width, which the kernels treat apart.
dims = st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 72, 128, 132, 256, 264, 384, 768]))


@dataclass(frozen=True)
class Call:
    """A call of an operator: `run(ops, **arguments)` gives what it returns and the states that it writes."""

    run: Callable[..., Any]
    arguments: dict[str, Any]
    by_row: tuple[
        str, ...
    ]  # arguments with a first dimension of rows that do not know each other; or none
    strided: tuple[str, ...]  # names of arguments whose rows may lie apart

    def results(self, ops, place=lambda _, tensor: tensor.clone()):
        """The results with every tensor copied to where `place` puts it."""
        placed = {
            k: place(k, v) if isinstance(v, torch.Tensor) else v for k, v in self.arguments.items()
        }
        results = self.run(ops, **placed)
        return results if isinstance(results, tuple) else (results,)

    def row_count(self):
        return next((len(v) for k, v in self.arguments.items() if k in self.by_row), 0)

    def row(self, i):
        """The call with row i alone."""
        alone = {
            k: v[i : i + 1] if k in self.by_row and v is not None else v
            for k, v in self.arguments.items()
        }
        return Call(self.run, alone, self.by_row, self.strided)


def of(name):
    """run() of an operator that writes nothing but its results."""
    return lambda ops, **arguments: getattr(ops, name)(**arguments)


def updating(name, state):
    """run() of an operator that writes a state as well."""
    return lambda ops, **arguments: (getattr(ops, name)(**arguments), arguments[state])


def product(name):
    """run() of a gemm, which packs the weight first."""

    def run(ops, a, weight, **given):
        return getattr(ops, name)(a, *ops.pack_gemm_weight(weight), **given)

    return run


def quantize_call(draw, generator, name):
    axis = draw(st.sampled_from([None, 0, 1]))
    case = QuantizeCase("", (draw(rows), draw(dims)), draw(dtypes), axis, draw(st.booleans()))
    x, scale, zero_point = case.make(generator)
    given = {"x": x, "scale": scale, "zero_point": zero_point, "axis": axis}
    by_row = ("x", "q", "scale", "zero_point") if axis == 0 else ("x", "q")
    if name == "quantize_dynamic":
        given = {"x": x, "axis": axis}
        by_row = by_row if axis == 0 else ()
    if name == "dequantize":
        del given["x"]
        given |= {"q": inputs.int8(case.shape, generator), "dtype": case.dtype}
    return Call(of(name), given, by_row, ("x", "q"))


def norm_call(draw, generator, name):
    shape = draw(rows), draw(dims)
    flags = (draw(st.booleans()) for _ in range(3))
    given = NormCase("", shape, draw(dtypes), draw(maybe_dtypes), *flags).make(generator)
    if name == "rmsnorm_quantize":
        del given["bias"]
    return Call(of(name), given, ("x", "residual"), ("x", "residual"))


def hadamard_call(draw, generator, name):
    size = draw(st.sampled_from([1, 2, 8, 12, 20, 32, 56, 64, 128, 192, 256, 320, 768]))
    case = HadamardCase("", (draw(rows), size), draw(dtypes), draw(st.booleans()))
    x, scale = case.make(generator)
    is_transform = name == "hadamard_transform"
    given = {"inverse": draw(st.booleans())} if is_transform else {"scale": scale}
    return Call(of(name), {"x": x, **given}, ("x",), ("x",))


def gemm_call(draw, generator, name):
    flags = (draw(st.booleans()) for _ in range(4))
    shape = draw(rows), draw(dims), draw(dims)
    case = GemmCase("", *shape, "random", *flags, draw(maybe_dtypes), draw(dtypes))
    a, weight = case.operands(generator)
    given = case.scales(generator)
    if name == "gemm":
        given = {"n": case.n}
    elif name == "gemm_dequantize":
        del given["out_scale"], given["out_zero_point"]
        given["dtype"] = case.dtype
    else:
        del given["residual"]
    by_row = ("a", "residual", "a_scale") if case.per_token else ("a", "residual")
    return Call(
        product(name), {"a": a, "weight": weight, **given}, by_row, ("a", "weight", "residual")
    )


def conv_call(draw, generator, name):
    sizes = draw(rows), draw(st.integers(1, 70)), draw(dims), draw(st.integers(2, 4))
    flags = (draw(st.booleans()) for _ in range(4))
    order = draw(st.sampled_from([None, "random"]))
    given = ConvCase("", *sizes, *flags, order=order).make(generator)
    if name == "causal_conv1d_quantize":
        return Call(of(name), given, ("x", "initial_state"), ("x",))
    del given["initial_state"], given["reverse"], given["order"]
    given["x"] = given["x"][:, 0]
    given["conv_state"] = inputs.int8((sizes[0], sizes[3] - 1, sizes[2]), generator)
    return Call(updating(name, "conv_state"), given, ("x", "conv_state"), ("x",))


def conv2d_call(draw, generator, name):
    kernel = draw(st.sampled_from([(3, 3), (7, 7), (1, 5)]))
    sizes = draw(rows), draw(st.integers(1, 16)), draw(st.integers(1, 16)), draw(dims)
    flags = draw(st.integers(1, 2)), draw(st.booleans()), draw(st.booleans())
    given = Conv2dCase("", *sizes, kernel, *flags).make(generator)
    return Call(of(name), given, ("x",), ("x",))


TOKENS = ("x", "dt", "B", "C", "z")
WALK = ("initial_state", "reverse", "order", "addend")  # what a single token has not


def scan_call(draw, generator, name):
    sizes = draw(rows), draw(st.integers(1, 20)), draw(st.integers(1, 70))
    readout = draw(st.sampled_from(["float", "int8", "rotated"]))
    C_dtype = draw(operand_dtypes) if readout == "float" else torch.int8
    operands = draw(dtypes), draw(operand_dtypes), C_dtype, draw(st.none() | operand_dtypes)
    flags = [draw(st.booleans()) for _ in range(3)]
    walk = draw(st.sampled_from([None, "random"])), draw(maybe_dtypes)
    dstate = draw(st.sampled_from([1, 4, 16, 16, 32]))
    given = ScanCase("", *sizes, dstate, *operands, draw(dtypes), *flags, *walk).make(generator)
    given["dtype"] = draw(dtypes)
    if readout != "float":
        given = with_int8_readout(given, readout == "rotated")
    if name == "selective_scan":
        given["chunk_size"] = draw(st.sampled_from([IN_SEQUENCE, IN_SEQUENCE, 0, 7]))
        by_token = (*TOKENS, "addend")
        by_row = (*by_token, "initial_state") if given["chunk_size"] == IN_SEQUENCE else ()
        return Call(of(name), given, by_row, by_token)
    given = {k: v for k, v in given.items() if k not in WALK}
    given |= {k: given[k][:, 0] for k in TOKENS if given[k] is not None}
    given["ssm_state"] = inputs.normal((sizes[0], dstate, sizes[2]), generator)
    return Call(updating(name, "ssm_state"), given, (*TOKENS, "ssm_state"), TOKENS)


MAKERS = {
    "quantize": quantize_call,
    "quantize_dynamic": quantize_call,
    "dequantize": quantize_call,
    "rmsnorm_quantize": norm_call,
    "layernorm_quantize": norm_call,
    "hadamard_transform": hadamard_call,
    "hadamard_quantize": hadamard_call,
    "gemm": gemm_call,
    "gemm_dequantize": gemm_call,
    "gemm_requantize": gemm_call,
    "causal_conv1d_quantize": conv_call,
    "causal_conv1d_update_quantize": conv_call,
    "depthwise_conv2d_quantize": conv2d_call,
    "selective_scan": scan_call,
    "selective_scan_update": scan_call,
}
every_operator = pytest.mark.parametrize("name", MAKERS)
few = settings(max_examples=15)


def call_of(name, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    return MAKERS[name](data.draw, generator, name)


def moved(tensor, offset, padding):
    """The values `offset` elements into a new buffer, with `padding` elements behind each row."""
    sizes, strides, step = tensor.shape, [1], tensor.shape[-1] + padding
    for size in reversed(sizes[1:] if len(sizes) > 1 else ()):
        strides.insert(0, step if len(strides) == 1 else step * size)
        step = strides[0]
    buffer = torch.zeros(offset + sizes[0] * strides[0], dtype=tensor.dtype)
    return buffer.as_strided(sizes, strides, offset).copy_(tensor)


@every_operator
@few
@given(st.data())
def test_results_do_not_depend_on_where_inputs_lie(ops, name, data):
    """Offsets that break every alignment, one by one for each tensor, and rows at odd distances."""
    call = call_of(name, data)
    offsets = st.integers(0, 17)

    def place(argument, tensor):
        padding = data.draw(offsets) if argument in call.strided else 0
        return moved(tensor, data.draw(offsets), padding)

    for actual, expected in zip(call.results(ops, place), call.results(ops), strict=True):
        assert_equal(actual, expected)


@every_operator
@few
@given(st.data())
def test_rows_do_not_depend_on_each_other(ops, name, data):
    call = call_of(name, data)
    whole = call.results(ops)
    for i in range(call.row_count()):
        for actual, expected in zip(call.row(i).results(ops), whole, strict=True):
            assert_equal(actual, expected[i : i + 1])
