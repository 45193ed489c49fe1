"""QuantMambaBlock: the integer data flow against its emulation, dtypes, copies, shapes, and tracing."""

import copy

import pytest
import torch
from torch.nn import functional as F

from mambaquant_ext import Fidelity, Granularity, QuantMambaBlock, Rotation, ops, recipe
from mambaquant_ext.calibrate import BlockRun, collect_ranges
from mambaquant_ext.model import Merge, block_forward
from mambaquant_ext.pack import pack_block
from mambaquant_ext.run.cache import StateDict
from mambaquant_ext.run.emulate import emulated_weights, round_symmetric, rounding_tap
from mambaquant_ext.run.modules import GemmWeight
from reference import selective_scan as scan_reference
from stages import models
from stages.hf_models import tiny_model
from tolerances import (
    BLOCK_SQNR_DB,
    INTEGER_EMULATED_SQNR_DB,
    assert_equal,
    assert_int8_close,
    sqnr_db,
)

VARIANTS = {
    "w8a8": recipe("w8a8"),
    "rtn": recipe("rtn"),
    "smoothquant": recipe("smoothquant"),
    "quarot": recipe("quarot"),
    "per tensor": recipe("w8a8").replace(granularity=Granularity.PER_TENSOR),
    "float read-out": recipe("w8a8").replace(state_rotation=False, quantize_readout=False),
    "no rotation": recipe("w8a8").replace(state_rotation=False, out_rotation=False),
}
named = pytest.mark.parametrize("variant", VARIANTS)
SHAPES = [
    {},
    {"use_bias": True},
    {"use_conv_bias": False},
    {"hidden_size": 32, "time_step_rank": 4},
]
shaped = pytest.mark.parametrize("sizes", SHAPES, ids=str)


def stream(batch=2, seqlen=40, hidden=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seqlen, hidden, generator=generator) * 2


def float_block(**sizes):
    return tiny_model(**sizes).backbone.layers[1]


def quantized(variant="w8a8", fidelity=Fidelity.INTEGER, **sizes):
    block = float_block(**sizes)
    inputs = [stream(hidden=sizes.get("hidden_size", 48), seed=seed) for seed in range(1, 6)]
    return QuantMambaBlock.from_float(block, inputs, VARIANTS[variant], fidelity)


# Integer against emulated


@named
@shaped
def test_integer_block_equals_its_emulation_up_to_rounding(variant, sizes, isa):
    block = quantized(variant, **sizes)
    emulated = QuantMambaBlock(block.packed, fidelity=Fidelity.EMULATED)
    x = stream(hidden=sizes.get("hidden_size", 48))
    # The residual is the larger part of the stream: what the mixer added is what is compared.
    assert sqnr_db(block(x) - x, emulated(x) - x) >= INTEGER_EMULATED_SQNR_DB


@named
def test_block_stays_close_to_the_float_block(variant):
    x = stream()
    with torch.no_grad():
        expected = float_block()(x) - x
    assert sqnr_db(quantized(variant)(x) - x, expected) >= BLOCK_SQNR_DB[variant]


def many_parts(merge, fidelity=Fidelity.INTEGER):
    """A quantized block of two convolutions and two branches, and the float one that it stands for."""
    layer = models.many_parts(torch.Generator().manual_seed(3), merge)
    chosen = recipe("rtn").replace(separate_class_token=True)
    ranges = collect_ranges(BlockRun(layer), [stream(8, 9, 16, seed) for seed in (1, 2)], chosen)
    return QuantMambaBlock(pack_block(layer, ranges.layers[0], chosen), fidelity=fidelity), layer


@pytest.mark.parametrize("merge", list(Merge))
def test_integer_block_of_many_parts_equals_its_emulation_and_is_close_to_float(merge, isa):
    block, layer = many_parts(merge)
    emulated, _ = many_parts(merge, Fidelity.EMULATED)
    x = stream(4, 9, 16)
    mixed = [block(x), emulated(x), block_forward(layer, x)[0]]
    no_mixer = layer.replace(out=torch.zeros_like(layer.out), out_bias=torch.zeros(16))
    actual, rounded, expected = (out - block_forward(no_mixer, x)[0] for out in mixed)
    assert sqnr_db(actual, rounded) >= INTEGER_EMULATED_SQNR_DB
    assert sqnr_db(actual, expected) >= BLOCK_SQNR_DB[f"many parts {merge.value}"]


@shaped
def test_integer_linears_equal_emulated_ones_bit_for_bit(sizes, isa, generator):
    """P17: on equal codes, float64 makes the emulated product exact, so that only the epilogue's roundings remain:
    int8 results are equal but on a boundary, and float results within them.
    """
    block = quantized(**sizes)
    p, layout = block.packed, block.layout
    (conv,), (branch,) = p.convs, p.branches
    float_weights = emulated_weights(p, torch.float64)
    (float_branch,) = float_weights.branches

    def codes(tokens, dim):
        return torch.randint(-127, 128, (tokens, dim), generator=generator, dtype=torch.int8)

    q = codes(33, layout.hidden)
    linear = GemmWeight(p.in_proj, p.in_proj_scale, p.in_proj_bias)
    weight = torch.cat([float_weights.in_x, float_weights.in_z])
    bias = torch.cat([float_weights.in_x_bias, float_weights.in_z_bias])
    value = F.linear(q.double() * p.in_scale.double(), weight, bias)
    emulated = round_symmetric(value, p.xz_scale, 8) / p.xz_scale.double()
    assert_int8_close(linear.requantize(q, p.in_scale, p.xz_scale), emulated.round().to(torch.int8))

    q = codes(33, layout.dim)
    linear = GemmWeight(branch.x_proj, branch.x_proj_scale, branch.x_proj_bias, conv.x_zero_point)
    weight = torch.cat([float_branch.x_dt, float_branch.x_B, float_branch.x_C])
    x = (q.double() - conv.x_zero_point) * conv.x_scale.double()
    value = F.linear(x, weight, branch.x_proj_bias.double())
    emulated = round_symmetric(value, branch.dtBC_scale, 8) / branch.dtBC_scale.double()
    actual = linear.requantize(q, torch.ones(1), branch.dtBC_scale)
    assert_int8_close(actual, emulated.round().to(torch.int8))

    q = codes(33, layout.branches[0].dt_rank)
    dt_scale = branch.dtBC_scale[:1].clone()
    actual = GemmWeight(branch.dt_proj, branch.dt_proj_scale).dequantize(q, dt_scale)
    accumulators = q.long() @ branch.dt_proj.long().T
    assert_equal(
        actual, accumulators.float() * (dt_scale * branch.dt_proj_scale)
    )  # float32, in the epilogue's order
    value = F.linear(q.double() * dt_scale.double(), float_branch.dt)
    torch.testing.assert_close(actual.double(), value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rotate", [False, True])
def test_integer_readout_equals_the_emulated_one_on_the_same_state(rotate, isa, generator):
    """h C with scale readout_scale[e] * C_scale: one token from a given state, dt = -inf keeps the state."""
    block = quantized("w8a8" if rotate else "no rotation")
    (p,), (sizes,), x_scale = (
        block.packed.branches,
        block.layout.branches,
        block.packed.convs[0].x_scale,
    )
    h = torch.randn(3, sizes.dstate, sizes.dim, generator=generator) * p.readout_scale * 50
    C = torch.randint(-127, 128, (3, sizes.dstate), generator=generator, dtype=torch.int8)
    C_scale = p.dtBC_scale[-1:].clone()
    zeros = torch.zeros(3, sizes.dim, dtype=torch.int8)
    y = ops.selective_scan_update(
        h.clone(),
        zeros,
        x_scale,
        None,
        torch.full((3, sizes.dim), -1e4),
        None,
        p.A,
        torch.zeros(3, sizes.dstate, dtype=torch.int8),
        x_scale[: sizes.dstate].clone(),
        C,
        C_scale,
        readout_scale=p.readout_scale,
        rotate_state=rotate,
    )
    qh = scan_reference.quantized_state(h, p.readout_scale, rotate).long()
    exact = (qh * C.long()[..., None]).sum(1).float()
    assert_equal(y, exact * (p.readout_scale * C_scale))
    seen = scan_reference.rotated(h) if rotate else h
    rounded = rounding_tap(block.packed)("h.0", seen.transpose(1, 2).double())
    emulated = torch.einsum("ben,bn->be", rounded, C.double() * C_scale.double())
    steps = (y.double() - emulated).abs() / (p.readout_scale.double() * C_scale.double())
    assert (
        int((steps > 1e-3 * exact.abs().clamp_min(1)).sum()) <= 1
    )  # a state on a rounding boundary


# Contract


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_block_keeps_shape_and_returns_float32_without_gradient(fidelity):
    block = quantized(fidelity=fidelity)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = stream().to(dtype).requires_grad_()
        out = block(x)
        assert out.shape == x.shape
        assert out.dtype == torch.float32
        assert not out.requires_grad
        assert_equal(out, block(x.float()))


def test_input_is_not_changed():
    block, x = quantized(), stream()
    before = x.clone()
    block(x, attention_mask=torch.tensor([[0] * 5 + [1] * 35, [1] * 40]))
    assert_equal(x, before)


def test_non_contiguous_input_equals_its_copy():
    block, x = quantized(), stream(batch=40, seqlen=2).transpose(0, 1)
    assert not x.is_contiguous()
    assert_equal(block(x), block(x.contiguous()))


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((2, 5, 47), r"\(batch, seqlen, 48\), got \(2, 5, 47\)"),
        ((5, 48), r"got \(5, 48\)"),
        ((1, 2, 5, 48), "got"),
    ],
)
def test_hidden_states_of_another_shape_are_refused(shape, match):
    with pytest.raises(ValueError, match=match):
        quantized()(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (5,), (2, 5, 1)])
def test_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 5\)"):
        quantized()(stream(seqlen=5), attention_mask=torch.ones(shape))


def test_empty_batch_and_empty_sequence_give_empty_results():
    block = quantized()
    for shape in ((0, 5, 48), (2, 0, 48)):
        assert block(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_state_carries_over(fidelity):
    block, x, cache = quantized(fidelity=fidelity), stream(), StateDict({})
    parts = torch.cat([block(part, cache) for part in x.split([3, 1, 30, 1, 5], 1)], 1)
    if fidelity is Fidelity.INTEGER:
        assert_equal(parts, block(x))
    else:
        assert sqnr_db(parts - x, block(x) - x) >= INTEGER_EMULATED_SQNR_DB


@pytest.mark.parametrize("bits", ["weight_bits", "activation_bits", "gate_bits"])
def test_fewer_than_8_bits_are_refused_for_integer(bits):
    fewer = recipe("w8a8").replace(**{bits: 7})
    with pytest.raises(ValueError, match=r"expected 8 bits everywhere .* use Fidelity\.EMULATED"):
        QuantMambaBlock.from_float(float_block(), [stream(batch=8)], fewer)
    block = QuantMambaBlock.from_float(float_block(), [stream(batch=8)], fewer, Fidelity.EMULATED)
    assert block(stream()).isfinite().all()


def test_block_without_calibration_inputs_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        QuantMambaBlock.from_float(float_block(), [], recipe("w8a8"))


def test_calibration_inputs_of_another_shape_are_refused():
    for x in (torch.zeros(2, 40, 47), torch.zeros(40, 48)):
        with pytest.raises(ValueError, match=r"\(batch, seqlen, 48\)"):
            QuantMambaBlock.from_float(float_block(), [x], recipe("w8a8"))


@pytest.mark.parametrize("kind", [Rotation.HADAMARD, Rotation.KLT])
def test_a_block_alone_rotates_its_own_input_online(kind):
    """The stream belongs to others: R1 is a Hadamard transform behind the norm, whichever the recipe names."""
    chosen = recipe("w8a8").replace(residual_rotation=kind)
    block = QuantMambaBlock.from_float(float_block(), [stream(batch=8)], chosen)
    assert block.layout.has_in_rotation
    assert_equal(block.packed.norm_weight, torch.ones(48))
    klt = QuantMambaBlock.from_float(float_block(), [stream(batch=8)], recipe("w8a8"))
    assert_equal(block(stream()), klt(stream()))
    off = chosen.replace(residual_rotation=Rotation.NONE)
    assert not QuantMambaBlock.from_float(
        float_block(), [stream(batch=8)], off
    ).layout.has_in_rotation


def test_a_block_alone_without_a_hadamard_matrix_names_the_nearest():
    with pytest.raises(ValueError, match=r"44.*48"):
        QuantMambaBlock.from_float(
            float_block(hidden_size=46), [stream(8, hidden=46)], recipe("w8a8")
        )


def test_a_grid_of_another_number_of_tokens_is_refused():
    block = quantized()
    assert_equal(block(stream(), grid=(5, 8)), block(stream()))
    with pytest.raises(ValueError, match=r"expected a grid of 40 tokens, got \(5, 7\)"):
        block(stream(), grid=(5, 7))


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_a_cache_for_a_block_of_several_routes_is_refused(fidelity):
    block, _ = many_parts(Merge.SUM, fidelity)
    with pytest.raises(ValueError, match="no cache for a block that walks several routes"):
        block(stream(1, 9, 16), StateDict({}))


def test_quantizing_leaves_the_float_block_alone():
    block, x = float_block(), stream()
    with torch.no_grad():
        expected = block(x)
        QuantMambaBlock.from_float(block, [stream(batch=8)], recipe("w8a8"))
        assert_equal(block(x), expected)


# Dtypes, copies, instruction sets


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_casting_keeps_every_tensor(cast, fidelity):
    block, x = quantized(fidelity=fidelity), stream()
    expected, dtypes = block(x), {name: t.dtype for name, t in block.named_buffers()}
    getattr(block, cast)()
    assert {name: t.dtype for name, t in block.named_buffers()} == dtypes
    assert_equal(block(x), expected)


def test_moving_to_another_device_is_refused():
    with pytest.raises(NotImplementedError, match=r"expected device cpu.* got meta"):
        quantized().to("meta")


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_copy_computes_the_same_and_shares_nothing(fidelity):
    block, x = quantized(fidelity=fidelity), stream()
    expected, twin = block(x), copy.deepcopy(block)
    for tensor in block.buffers():
        tensor.zero_()
    assert_equal(twin(x), expected)


def test_weights_packed_for_another_isa_are_refused_not_misread():
    from mambaquant_ext import forced_isa, supported_isas

    if len(supported_isas()) < 2:
        pytest.skip("one instruction set")
    first, second = supported_isas()[:2]
    with forced_isa(first):
        block = quantized()
    with forced_isa(second), pytest.raises(NotImplementedError, match="pack the weight again"):
        block(stream())


def test_every_isa_gives_nearly_the_same_block(isa):
    from mambaquant_ext import forced_isa

    block, x = quantized(), stream()
    with forced_isa("scalar"):
        scalar = QuantMambaBlock(block.packed)(x)
    assert sqnr_db(block(x) - x, scalar - x) >= INTEGER_EMULATED_SQNR_DB


# Tracing


def test_operators_in_a_row_are_traced_into_one_graph():
    """torch.compile(fullgraph=True): each operator has a fake implementation that fits the next."""
    block = quantized()
    p, e, (branch,) = block.packed, block.executor, block.executor.branches
    (conv_constants,), scan_constants = e.convs, {**branch.scan_constants, **branch.gate_constants}
    weights = {
        "in_proj": e.in_proj,
        "x_proj": branch.x_proj,
        "dt_proj": branch.dt_proj,
        "out_proj": e.exit.out_proj,
    }
    dtBC_scale, dt_scale = branch.dtBC_scale, branch.dt_scale
    tensors = {name: (w.packed, w.scale, w.acc_offset, w.bias) for name, w in weights.items()}
    layouts = {name: w.layout for name, w in weights.items()}
    parts, dim = branch.parts, p.layout.dim

    def requantize(name, a, a_scale, out_scale):
        packed, scale, offset, bias = tensors[name]
        return ops.gemm_requantize(
            a, packed, layouts[name], a_scale, scale, out_scale, offset, bias
        )

    def dequantize(name, a, a_scale, residual=None):
        packed, scale, offset, bias = tensors[name]
        return ops.gemm_dequantize(a, packed, layouts[name], a_scale, scale, offset, bias, residual)

    def run(x, conv_state, ssm_state):
        batch, seqlen, hidden = x.shape
        residual = x.reshape(-1, hidden)
        q, _, _ = ops.rmsnorm_quantize(residual, None, None, p.in_scale, 1e-5)
        xs, z = (
            requantize("in_proj", q, p.in_scale, p.xz_scale)
            .unflatten(0, (batch, seqlen))
            .split(dim, -1)
        )
        u, state = ops.causal_conv1d_quantize(xs, initial_state=conv_state, **conv_constants)
        dt, B, C = requantize("x_proj", u.flatten(0, 1), torch.ones(1), dtBC_scale).split(parts, -1)
        delta = dequantize("dt_proj", dt, dt_scale)
        y, ssm_state = ops.selective_scan(
            x=u,
            dt=delta.unflatten(0, (batch, seqlen)),
            B=B.unflatten(0, (batch, seqlen)),
            C=C.unflatten(0, (batch, seqlen)),
            z=z,
            initial_state=ssm_state,
            **scan_constants,
        )
        # The way back over the same tokens, added to the way there.
        order = torch.arange(seqlen, dtype=torch.int32).flip(0)
        u_back, _ = ops.causal_conv1d_quantize(xs, order=order, reverse=True, **conv_constants)
        y, _ = ops.selective_scan(
            x=u_back,
            dt=delta.unflatten(0, (batch, seqlen)),
            B=B.unflatten(0, (batch, seqlen)),
            C=C.unflatten(0, (batch, seqlen)),
            z=z,
            order=order,
            addend=y,
            **scan_constants,
        )
        q, _ = ops.hadamard_quantize(y.reshape(batch * seqlen, dim), p.out_scale)
        out = dequantize("out_proj", q, p.out_scale, residual)
        # What a step and the other operators add to the sequence.
        state = state.clone()
        step = ops.causal_conv1d_update_quantize(xs[:, 0], state, **conv_constants)
        h = ssm_state.clone()
        v = ops.selective_scan_update(
            h, x=step, dt=delta[:batch], B=B[:batch], C=C[:batch], z=z[:, 0], **scan_constants
        )
        codes, scale = ops.quantize_dynamic(ops.hadamard_transform(v), 0)
        back = ops.dequantize(ops.quantize(v, p.out_scale), p.out_scale)
        normed, _, _ = ops.layernorm_quantize(back, None, None, None, p.out_scale)
        packed, _ = ops.pack_gemm_weight(p.out_proj)
        acc = ops.gemm(normed, packed, layouts["out_proj"], hidden)
        return out, state, h, codes, scale, acc

    arguments = (
        stream(seqlen=6),
        torch.ones(2, p.layout.convs[0].kernel[0] - 1, dim, dtype=torch.int8),
        torch.ones(2, p.layout.branches[0].dstate, dim),
    )
    expected = run(*arguments)
    torch._dynamo.reset()
    traced = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for actual, wanted in zip(traced, expected, strict=True):
        assert_equal(actual, wanted)
