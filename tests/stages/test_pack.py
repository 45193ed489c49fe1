"""Weight codes, scales and zero points: properties of the grids, and the integers against their floats."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambaquant_ext.artifacts import PackedBlock, Range, RangeStats
from mambaquant_ext.calibrate import BlockRun, LanguageRun, collect_ranges
from mambaquant_ext.config import PRESETS, Granularity, Rotation
from mambaquant_ext.model import Merge
from mambaquant_ext.pack import pack_block, pack_blocks, pack_head, pack_linear, quantize_weight
from mambaquant_ext.pack.weights import asymmetric_scale, qmax, symmetric_scale
from mambaquant_ext.pipeline import LanguageSource
from mambaquant_ext.run.emulate import emulated_weights, round_asymmetric, round_symmetric
from mambaquant_ext.run.modules import GemmWeight
from stages import models
from tolerances import HALF_STEP, assert_equal, assert_relative

BITS = (8, 6, 4, 2)
bits_of = pytest.mark.parametrize("bits", BITS)
geometries = pytest.mark.parametrize("sizes", models.GEOMETRIES, ids=lambda sizes: sizes.name)
RECIPES = {
    "w8a8": PRESETS["w8a8"].replace(
        residual_rotation=Rotation.NONE, out_rotation=False, state_rotation=False,
        dt_rotation=Rotation.NONE,
    ),
    "rtn": PRESETS["rtn"],
    "float-readout": PRESETS["rtn"].replace(quantize_readout=False),
    "w4a6": PRESETS["rtn"].replace(
        weight_bits=4, activation_bits=6, gate_bits=5, granularity=Granularity.PER_CHANNEL
    ),
}  # fmt: skip


# What a block says without tensors.
PLAIN = (
    *("routes", "merge", "merge_gate", "merge_threshold", "out_norm", "squeeze", "excite"),
    *("skip", "skip_weight", "skip_bias", "class_token"),
    *("has_in_rotation", "has_out_rotation", "has_state_rotation"),
)


def dequantized(q, scale):
    return q.double() * scale.double()[:, None]


def random_weight(generator, rows=13, columns=29):
    return (
        torch.randn(rows, columns, generator=generator)
        * models.spread(generator, rows, 2)[:, None].float()
    )


# Weights: the properties of a quantizer that P18 lists.


@bits_of
def test_a_weight_is_within_half_a_step_of_its_code_and_reaches_both_ends(bits, generator):
    weight = random_weight(generator)
    q, scale = quantize_weight(weight, bits)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (13,))
    error = (dequantized(q, scale) - weight.double()).abs()
    assert (error <= HALF_STEP * scale.double()[:, None]).all()
    assert_equal(q.abs().amax(1), torch.full((13,), qmax(bits), dtype=torch.int8))


@bits_of
def test_quantizing_again_changes_nothing(bits, generator):
    q, scale = quantize_weight(random_weight(generator), bits)
    again, same = quantize_weight(dequantized(q, scale).float(), bits)
    assert_equal(again, q)
    assert_relative(same, scale, torch.float32)


@bits_of
def test_codes_are_monotone_odd_and_zero_for_zero(bits):
    weight = torch.linspace(-1, 1, 2001)[None]
    q, _ = quantize_weight(weight, bits)
    assert (q[0].diff() >= 0).all()
    assert_equal(quantize_weight(-weight, bits)[0], -q)
    assert q[0, 1000] == 0
    assert len(q.unique()) == 2 * qmax(bits) + 1


@given(st.integers(-100, 60), st.sampled_from(BITS), st.integers(0, 2**31))
def test_codes_do_not_depend_on_the_unit_of_a_row(power, bits, seed):
    """A row of tiny weights has as many steps as any other; scales stay normal float32."""
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    q, scale = quantize_weight(weight, bits)
    scaled_q, scaled = quantize_weight(torch.ldexp(weight, torch.tensor(power)), bits)
    if power >= -50:
        assert_equal(scaled_q, q)
        assert_equal(scaled, torch.ldexp(scale, torch.tensor(power)))
    assert (scaled > 0).all()
    assert (1 / scaled).isfinite().all()


def test_rows_are_quantized_one_by_one(generator):
    weight = random_weight(generator)
    q, scale = quantize_weight(weight, 8)
    for row in range(len(weight)):
        one_q, one_scale = quantize_weight(weight[row : row + 1], 8)
        assert_equal(one_q[0], q[row])
        assert_equal(one_scale, scale[row : row + 1])


def test_dead_rows_and_empty_weights_have_usable_scales():
    q, scale = quantize_weight(torch.zeros(2, 5), 8)
    assert_equal(q, torch.zeros(2, 5, dtype=torch.int8))
    assert (1 / scale).isfinite().all()
    assert quantize_weight(torch.zeros(3, 0), 8)[0].shape == (3, 0)
    assert quantize_weight(torch.zeros(0, 5), 8)[1].shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    weight = torch.zeros(2, 3)
    weight[1, 2] = bad
    with pytest.raises(
        ValueError, match="quantize_weight: expected finite weights, got inf or NaN"
    ):
        quantize_weight(weight, 8)


# Scales of activations: the same properties.


@bits_of
def test_a_symmetric_range_is_covered_to_half_a_step(bits, generator):
    found = Range(low=torch.tensor([-3.0, -0.1]), high=torch.tensor([2.0, 5.0]))
    scale = symmetric_scale(found, bits, 2)
    assert_relative(scale * qmax(bits), torch.tensor([3.0, 5.0]), torch.float32)
    x = torch.linspace(-1, 1, 999)[:, None] * torch.tensor([3.0, 5.0])
    rounded = round_symmetric(x, scale, bits)
    assert ((rounded - x).abs() <= HALF_STEP * scale).all()
    assert (rounded.diff(dim=0) >= 0).all()
    assert_equal(round_symmetric(rounded, scale, bits), rounded)


@bits_of
@given(low=st.floats(-1e3, 0, width=32), high=st.floats(0, 1e3, width=32), seed=st.integers(0, 99))
def test_an_asymmetric_range_is_covered_and_holds_zero_exactly(bits, low, high, seed):
    found = Range(low=torch.tensor([low]), high=torch.tensor([high]))
    scale, zero_point = asymmetric_scale(found, bits, 1)
    half = 2 ** (bits - 1)
    assert zero_point.dtype == torch.int32
    assert -half <= zero_point.item() <= half - 1
    assert round_asymmetric(torch.zeros(1), scale, zero_point, bits).item() == 0
    x = low + (high - low) * torch.rand(50, 1, generator=torch.Generator().manual_seed(seed))
    rounded = round_asymmetric(x, scale, zero_point, bits)
    # The ends as well, although the zero point is rounded: both roundings up by more than a half cannot be.
    assert ((rounded - x).abs() <= HALF_STEP * scale + 1e-6 * abs(high - low)).all()
    assert_equal(round_asymmetric(rounded, scale, zero_point, bits), rounded)


def test_one_range_is_repeated_and_many_are_kept():
    one = Range(low=torch.tensor([-1.0]), high=torch.tensor([1.0]))
    many = Range(low=torch.tensor([-1.0, -2.0]), high=torch.tensor([0.5, 4.0]))
    assert symmetric_scale(one, 8, 5).unique().numel() == 1
    assert asymmetric_scale(one, 8, 5)[0].shape == asymmetric_scale(one, 8, 5)[1].shape == (5,)
    assert_equal(symmetric_scale(many, 8, 2), many.amax / 127)


def test_a_dead_activation_has_a_usable_scale():
    dead = Range(low=torch.zeros(2), high=torch.zeros(2))
    assert (1 / symmetric_scale(dead, 8, 2)).isfinite().all()
    scale, zero_point = asymmetric_scale(dead, 8, 2)
    assert (1 / scale).isfinite().all()
    assert_equal(zero_point, torch.full((2,), -128, dtype=torch.int32))


# Integers against what they stand for: P17.


@pytest.mark.parametrize("static", [False, True])
def test_the_zero_point_offset_makes_the_integer_product_the_dequantized_one(
    static, isa, generator
):
    """sum (qx - zx) qw = sum qx qw - acc_offset, with one zero point a column: exact in float64, and the kernel's
    float32 result is that integer times the scales."""
    weight = random_weight(generator, 21, 40)
    q, scale = quantize_weight(weight, 8)
    zero_point = torch.randint(-128, 128, (40,), generator=generator, dtype=torch.int32)
    if static:
        zero_point = zero_point[:1].expand(40).contiguous()
    bias = torch.randn(21, generator=generator)
    x = torch.randint(-128, 128, (7, 40), generator=generator, dtype=torch.int32).to(torch.int8)
    linear = GemmWeight(q, scale, bias, zero_point)
    exact = (x.double() - zero_point.double()) @ q.double().T
    acc = x.double() @ q.double().T - linear.acc_offset.double()
    assert torch.equal(acc, exact)
    a_scale = torch.tensor([0.03])
    expected = exact.float() * (a_scale * scale) + bias
    assert_equal(linear.dequantize(x, a_scale), expected)


@geometries
@pytest.mark.parametrize("name", RECIPES)
def test_packed_tensors_have_the_shapes_dtypes_and_grids_of_the_recipe(name, sizes):
    recipe = RECIPES[name]
    packed, _, _ = packed_model(sizes, recipe)
    for block in packed.blocks:
        found = {key: (tuple(t.shape), t.dtype) for key, t in block.tensors().items()}
        layout = block.layout
        assert found == layout.expected()
        (conv,), (branch,) = layout.convs, layout.branches
        assert (layout.hidden, layout.dim, conv.kernel) == (sizes.hidden, sizes.dim, (sizes.width,))
        assert (branch.dim, branch.dstate, branch.dt_rank) == (
            sizes.dim, sizes.dstate, sizes.dt_rank,
        )  # fmt: skip
        for key, tensor in block.tensors().items():
            assert tensor.is_contiguous(), key
            if tensor.dtype == torch.int8:
                assert int(tensor.abs().max()) == qmax(recipe.weight_bits), key
            if key.endswith("_scale"):
                assert (tensor > 0).all(), key
        half = 2 ** (recipe.activation_bits - 1)
        assert (block.convs[0].x_zero_point >= -half).all()
        assert (block.convs[0].x_zero_point < half).all()
        assert (layout.weight_bits, layout.activation_bits, layout.gate_bits) == (
            recipe.weight_bits, recipe.activation_bits, recipe.gate_bits,
        )  # fmt: skip
        assert layout.quantize_readout == recipe.quantize_readout
    assert packed.recipe == recipe
    assert packed.provenance == {"tokens": 1}
    assert packed.names == tuple(f"backbone.layers.{index}" for index in range(sizes.layers))


def packed_model(sizes, recipe):
    """Packed model, the float32 model and the ranges behind it."""
    model = models.model(sizes).to(torch.float32)
    run = LanguageRun(model)
    ranges = collect_ranges(run, models.batches(sizes), recipe)
    return LanguageSource(model).pack(run, ranges, recipe, {"tokens": 1}), model, ranges


@geometries
@pytest.mark.parametrize("name", RECIPES)
def test_every_dequantized_weight_is_within_half_a_step_of_the_float_one(name, sizes):
    """The folding of x's scale into x_proj undone; rows are in the order in which the runtime reads them."""
    packed, model, _ = packed_model(sizes, RECIPES[name])
    for block, layer in zip(packed.blocks, model.layers, strict=True):
        emulated = emulated_weights(block, torch.float64)
        (conv,), (branch,) = block.convs, block.branches
        in_scale = block.in_proj_scale.double().split(sizes.dim)
        x_scale = branch.x_proj_scale.double().split([sizes.dt_rank, sizes.dstate, sizes.dstate])
        steps = {
            "in_x": in_scale[0][:, None],
            "in_z": in_scale[1][:, None],
            "conv": conv.weight_scale[:, None],
            "x_dt": x_scale[0][:, None] / conv.x_scale.double(),
            "x_B": x_scale[1][:, None] / conv.x_scale.double(),
            "x_C": x_scale[2][:, None] / conv.x_scale.double(),
            "dt": branch.dt_proj_scale[:, None],
            "out": block.out_proj_scale[:, None],
        }
        found, wanted = vars(models.flat(emulated)), vars(models.flat(layer))
        assert found.keys() == wanted.keys() > steps.keys()
        for field, step in steps.items():
            error = (found[field] - wanted[field].double()).abs()
            assert (error <= HALF_STEP * step).all(), field
        for field in wanted.keys() - steps.keys():
            if isinstance(wanted[field], torch.Tensor):
                assert_equal(found[field], wanted[field].double())
            else:
                assert found[field] == wanted[field], field
        assert_equal(emulated.norm.bias, layer.norm.bias.double())
        for field in PLAIN:
            assert getattr(emulated, field) == getattr(layer, field), field


@geometries
def test_activation_scales_are_those_of_their_sites_in_the_order_of_the_rows(sizes):
    recipe = RECIPES["w4a6"]
    packed, _, ranges = packed_model(sizes, recipe)
    for block, found in zip(packed.blocks, ranges.layers, strict=True):
        dim, parts = sizes.dim, [sizes.dt_rank, sizes.dstate, sizes.dstate]
        xs, z = block.xz_scale.split(dim)
        assert_equal(xs, found["xs"].amax / qmax(6))
        assert_equal(z, found["z"].amax / qmax(5))
        (conv,), (branch,) = block.convs, block.branches
        dt, B, C = branch.dtBC_scale.split(parts)
        assert_equal(dt, (found["dt.0"].amax / qmax(6)).expand(parts[0]))
        assert_equal(B, found["B.0"].amax / qmax(6))
        assert_equal(C, (found["C.0"].amax / qmax(6)).expand(parts[2]))
        assert_equal(block.in_scale, found["in"].amax / qmax(6))
        assert_equal(block.out_scale, found["out"].amax / qmax(6))
        assert_equal(branch.readout_scale, found["h.0"].amax / qmax(6))
        scale, zero_point = asymmetric_scale(found["x.0"], 6, dim)
        assert_equal(conv.x_scale, scale)
        assert_equal(conv.x_zero_point, zero_point)


@geometries
def test_per_tensor_granularity_has_one_scale_a_site_and_per_channel_many(sizes):
    tensor, channel = (
        packed_model(sizes, PRESETS["rtn"].replace(granularity=granularity))[0].blocks[0]
        for granularity in (Granularity.PER_TENSOR, Granularity.PER_CHANNEL)
    )
    dim, dt_rank, dstate = sizes.dim, sizes.dt_rank, sizes.dstate

    def sites(block):
        return {
            "xs": block.xz_scale[:dim],
            "z": block.xz_scale[dim:],
            "x": block.convs[0].x_scale,
            "B": block.branches[0].dtBC_scale[dt_rank : dt_rank + dstate],
            "h": block.branches[0].readout_scale,
        }

    for site, scales in sites(tensor).items():
        assert scales.unique().numel() == 1, site
    for site, scales in sites(channel).items():
        assert scales.unique().numel() > len(scales) // 2, site
        assert (
            scales.max() == pytest.approx(float(sites(tensor)[site].max()), rel=0.01) or site == "x"
        )
    for block in (tensor, channel):  # contracted over: one scale, whatever the recipe
        dtBC_scale = block.branches[0].dtBC_scale
        assert dtBC_scale[:dt_rank].unique().numel() == 1
        assert dtBC_scale[dt_rank + dstate :].unique().numel() == 1


def test_a_float_read_out_has_scales_of_one():
    packed, _, _ = packed_model(models.REAL, RECIPES["float-readout"])
    assert_equal(packed.blocks[0].branches[0].readout_scale, torch.ones(96))


@pytest.mark.parametrize("quantize_embedding", [False, True])
@pytest.mark.parametrize("quantize_head", [False, True])
def test_the_ends_are_int8_or_float_as_the_recipe_says(quantize_embedding, quantize_head):
    recipe = PRESETS["rtn"].replace(
        quantize_embedding=quantize_embedding, quantize_head=quantize_head, weight_bits=6
    )
    packed, model, ranges = packed_model(models.REAL, recipe)
    head = packed.head
    assert_equal(head.norm_f, model.norm_f)
    if quantize_embedding:
        # A look-up needs no product: 8 bits whatever the weights have.
        codes, scale = quantize_weight(model.embedding, 8)
        assert_equal(head.embedding, codes)
        assert_equal(head.embedding_scale, scale)
    else:
        assert_equal(head.embedding, model.embedding.to(torch.float16))
        assert head.embedding_scale is None
    if quantize_head:
        codes, scale = quantize_weight(model.lm_head, 6)
        assert_equal(head.lm_head, codes)
        assert_equal(head.lm_head_scale, scale)
        assert_equal(head.head_scale, ranges.head.amax / 127)
    else:
        assert_equal(head.lm_head, model.lm_head)
        assert head.lm_head_scale is head.head_scale is None
    assert set(head.tensors()) == {
        "embedding", "norm_f", "lm_head",
        *(["embedding_scale"] if quantize_embedding else []),
        *(["lm_head_scale", "head_scale"] if quantize_head else []),
    }  # fmt: skip


def test_packing_twice_gives_equal_bits():
    first, _, _ = packed_model(models.REAL, RECIPES["rtn"])
    second, _, _ = packed_model(models.REAL, RECIPES["rtn"])
    for one, other in zip(first.blocks, second.blocks, strict=True):
        for name, tensor in one.tensors().items():
            assert_equal(tensor, other.tensors()[name])


def test_bad_input_is_refused():
    recipe = PRESETS["rtn"]
    _, model, ranges = packed_model(models.REAL, recipe)
    layer = model.layers[0]
    (conv,), (branch,) = layer.convs, layer.branches

    def spoiled(part, field):
        return part.replace(**{field: torch.full_like(getattr(part, field), torch.nan)})

    broken = [layer.replace(norm=spoiled(layer.norm, field)) for field in ("weight", "bias")]
    broken += [layer.replace(convs=(spoiled(conv, field),)) for field in ("weight", "bias")]
    for field in ("x_C", "dt", "A", "D", "dt_bias"):
        broken.append(layer.replace(branches=(spoiled(branch, field),)))
    broken += [spoiled(layer, field) for field in ("in_z", "out", "out_bias")]
    for bad in broken:
        with pytest.raises(ValueError, match="expected finite"):
            pack_block(bad, ranges.layers[0], recipe)
    for field in ("norm_f", "lm_head", "embedding"):
        bad = model.replace(**{field: torch.full_like(getattr(model, field), torch.inf)})
        with pytest.raises(ValueError, match="expected finite"):
            pack_head(bad, ranges.head, recipe)
    shorter = RangeStats(layers=ranges.layers[:1], head=ranges.head)
    with pytest.raises(ValueError, match="pack: expected ranges of 2 layers, got 1"):
        pack_blocks(model.layers, shorter, recipe)


@pytest.mark.parametrize("name", RECIPES)
def test_a_block_is_its_layout_and_its_named_tensors(name):
    """tensors() and from_tensors() are each other's inverse, and their names are those of the layout."""
    block = packed_model(models.REAL, RECIPES[name])[0].blocks[0]
    tensors = block.tensors()
    assert tensors.keys() == block.layout.expected().keys()
    again = PackedBlock.from_tensors(block.layout, tensors)
    assert again.layout == block.layout
    assert again.tensors().keys() == tensors.keys()
    for key, tensor in again.tensors().items():
        assert tensor is tensors[key], key
    for field in dataclasses.fields(PackedBlock):
        assert (getattr(again, field.name) is None) == (getattr(block, field.name) is None)
    with pytest.raises(KeyError, match=r"branches\.0\.A"):
        PackedBlock.from_tensors(
            block.layout, {key: t for key, t in tensors.items() if key != "branches.0.A"}
        )


@pytest.mark.parametrize("merge", [Merge.GATED, Merge.NORMED_SUM])
def test_a_block_of_many_parts_is_its_layout_and_its_named_tensors(merge, generator):
    """Two convolutions, two branches, and every optional tensor that the merge allows."""
    layer = models.many_parts(generator, merge)
    recipe = PRESETS["rtn"].replace(separate_class_token=True)
    tokens = torch.randn(2, 9, 16, generator=generator)
    ranges = collect_ranges(BlockRun(layer), [tokens], recipe).layers[0]
    block = pack_block(layer, ranges, recipe)
    tensors = block.tensors()
    found = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}
    assert found == block.layout.expected()
    absent = {f.name for f in dataclasses.fields(block) if getattr(block, f.name) is None}
    norm = {"out_norm_weight", "out_norm_bias", "squeeze", "excite"}
    assert absent == (norm if merge is Merge.GATED else {"merge_gate"})
    again = PackedBlock.from_tensors(block.layout, tensors)
    assert len(again.convs) == len(again.branches) == 2
    for key, tensor in again.tensors().items():
        assert tensor is tensors[key], key
    for index in range(2):
        assert again.branches[index].A is block.branches[index].A
        assert again.convs[index].weight is block.convs[index].weight


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_is_packed_as_a_matrix_of_a_block_is(has_bias, generator):
    weight = random_weight(generator)
    bias = torch.randn(13, generator=generator) if has_bias else None
    found = Range(low=torch.tensor([-3.0]), high=torch.tensor([2.0]))
    packed = pack_linear(weight, bias, found, PRESETS["rtn"].replace(weight_bits=5))
    codes, scale = quantize_weight(weight, 5)
    assert_equal(packed.weight, codes)
    assert_equal(packed.weight_scale, scale)
    assert_equal(packed.bias, bias if has_bias else torch.zeros(13))
    assert_equal(packed.in_scale, torch.tensor([3.0]) / 127)
    with pytest.raises(ValueError, match="expected finite"):
        pack_linear(weight, torch.full((13,), torch.nan), found, PRESETS["rtn"])
