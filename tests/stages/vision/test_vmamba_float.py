"""VMamba in float: the published parameters, the routes, and the mixer against plain loops."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch.nn import functional as F

from mambaquant_ext.model.vision.hierarchy import Downsample, PatchEmbed
from mambaquant_ext.model.vision.vmamba import (
    PRESETS,
    SS2D,
    VMamba,
    VMambaConfig,
    cross_merge,
    cross_scan,
    from_published,
)
from stages.vision import oracles
from tolerances import assert_relative

SMALL = VMambaConfig(depths=(1, 2), dims=(8, 12), classes=5, dstate=3)


def published_shapes(
    depths, first, dstate, ssm_ratio, has_z, has_conv_bias, has_mlp, is_first_release
):
    """The state dict of a published checkpoint, by the rules of its configuration."""
    shapes = {}

    def norm(name, dim):
        shapes.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})

    def conv(name, out, channels, width):
        shapes.update({f"{name}.weight": (out, channels, width, width), f"{name}.bias": (out,)})

    if is_first_release:
        conv("patch_embed.0", first, 3, 4)
        norm("patch_embed.2", first)
    else:
        conv("patch_embed.0", first // 2, 3, 3)
        norm("patch_embed.2", first // 2)
        conv("patch_embed.5", first, first // 2, 3)
        norm("patch_embed.7", first)
    for i, depth in enumerate(depths):
        width = first * 2**i
        dim, rank = int(ssm_ratio * width), math.ceil(width / 16)
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            norm(f"{block}.norm", width)
            shapes[f"{block}.op.in_proj.weight"] = (dim * (1 + has_z), width)
            shapes[f"{block}.op.conv2d.weight"] = (dim, 1, 3, 3)
            if has_conv_bias:
                shapes[f"{block}.op.conv2d.bias"] = (dim,)
            shapes[f"{block}.op.x_proj_weight"] = (4, rank + 2 * dstate, dim)
            shapes[f"{block}.op.dt_projs_weight"] = (4, dim, rank)
            shapes[f"{block}.op.dt_projs_bias"] = (4, dim)
            shapes[f"{block}.op.A_logs"] = (4 * dim, dstate)
            shapes[f"{block}.op.Ds"] = (4 * dim,)
            norm(f"{block}.op.out_norm", dim)
            shapes[f"{block}.op.out_proj.weight"] = (width, dim)
            if has_mlp:
                norm(f"{block}.norm2", width)
                shapes[f"{block}.mlp.fc1.weight"] = (4 * width, width)
                shapes[f"{block}.mlp.fc1.bias"] = (4 * width,)
                shapes[f"{block}.mlp.fc2.weight"] = (width, 4 * width)
                shapes[f"{block}.mlp.fc2.bias"] = (width,)
        if i + 1 < len(depths) and is_first_release:
            norm(f"layers.{i}.downsample.norm", 4 * width)
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * width, 4 * width)
        elif i + 1 < len(depths):
            conv(f"layers.{i}.downsample.1", 2 * width, width, 3)
            norm(f"layers.{i}.downsample.3", 2 * width)
    norm("classifier.norm", width)
    shapes.update({"classifier.head.weight": (1000, width), "classifier.head.bias": (1000,)})
    return shapes


# name: arguments of published_shapes, and the number of parameters that the public code counts.
PUBLISHED = {
    "tiny-s1l8": (((2, 2, 8, 2), 96, 1, 1, False, False, True, False), 30_249_064),
    "small-s1l20": (((2, 2, 20, 2), 96, 1, 1, False, False, True, False), 49_012_840),
    "base-s1l20": (((2, 2, 20, 2), 128, 1, 1, False, False, True, False), 86_614_504),
    "tiny-s2l5": (((2, 2, 5, 2), 96, 1, 2, False, False, True, False), 30_705_832),
    "small-s2l15": (((2, 2, 15, 2), 96, 1, 2, False, False, True, False), 50_147_752),
    "base-s2l15": (((2, 2, 15, 2), 128, 1, 2, False, False, True, False), 88_557_800),
    "tiny-v0": (((2, 2, 9, 2), 96, 16, 2, True, True, False, True), 22_893_448),
    "small-v0": (((2, 2, 27, 2), 96, 16, 2, True, True, False, True), 44_417_416),
    "base-v0": (((2, 2, 27, 2), 128, 16, 2, True, True, False, True), 76_254_056),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_parameters(name):
    arguments, count = PUBLISHED[name]
    with torch.device("meta"):
        model = VMamba(PRESETS[name])
    assert oracles.shapes(model) == published_shapes(*arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_names_and_shapes_of_the_first_release_are_understood():
    config = dataclasses.replace(
        SMALL, mlp_ratio=0.0, patch_embed=PatchEmbed.V1, downsample=Downsample.V1, has_gate=True
    )
    model = oracles.randomised(VMamba(config))
    first = {}
    for name, tensor in model.state_dict().items():
        old = name.replace("patch_embed.0", "patch_embed.proj").replace("classifier.", "")
        old = old.replace("patch_embed.2", "patch_embed.norm").replace(".op.", ".self_attention.")
        if "blocks" in old and ".norm." in old:
            old = old.replace(".norm.", ".ln_1.")
        is_conv = old.endswith("in_proj.weight")  # a channel-first model may have 1x1 convs
        first[old] = tensor[:, :, None, None] if is_conv else tensor
    assert "layers.0.blocks.0.ln_1.weight" in first
    assert "norm.weight" in first
    other = VMamba(config).double()
    other.load_state_dict(from_published(first))
    assert torch.equal(other(oracles.images(1, 3, 16, 16)), model(oracles.images(1, 3, 16, 16)))


def test_present_names_stay_as_they_are():
    state = VMamba(SMALL).state_dict()
    renamed = from_published(state)
    assert list(renamed) == list(state)
    assert all(torch.equal(renamed[name], state[name]) for name in state)


def test_the_four_routes_of_a_small_map():
    grid = torch.arange(6.0).view(1, 2, 3, 1)
    routes = cross_scan(grid)[:, 0, :, 0].int().tolist()
    assert routes == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


def test_merge_puts_every_route_back():
    x = oracles.images(2, 3, 5, 4)
    routes = cross_scan(x)
    assert_relative(cross_merge(routes, 3, 5), 4 * x)
    for kept in range(4):
        alone = torch.zeros_like(routes)
        alone[kept] = routes[kept]
        assert torch.equal(cross_merge(alone, 3, 5), x)


def mixer(has_gate=True, width=3):
    return oracles.randomised(
        SS2D(
            hidden=6,
            dim=8,
            dt_rank=2,
            dstate=3,
            conv_width=width,
            has_conv_bias=True,
            has_gate=has_gate,
        )
    )


def route_orders(height, width):
    rows = [i * width + j for i in range(height) for j in range(width)]
    columns = [i * width + j for j in range(width) for i in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]]


@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("width", [3, 5])
def test_mixer_equals_plain_loops(has_gate, width):
    op, hidden = mixer(has_gate, width), oracles.images(1, 3, 4, 6)
    projected = hidden[0] @ op.in_proj.weight.T
    padded = F.pad(projected[..., :8], (0, 0, width // 2, width // 2, width // 2, width // 2))
    conv = torch.zeros(3, 4, 8, dtype=torch.float64)
    for i in range(width):
        for j in range(width):
            conv += padded[i : i + 3, j : j + 4] * op.conv2d.weight[:, 0, i, j]
    conv += op.conv2d.bias
    x = (conv / (1 + torch.exp(-conv))).flatten(0, 1)
    y = sum(
        oracles.branch_scan(x, order, *oracles.branch_weights(op, k))
        for k, order in enumerate(route_orders(3, 4))
    )
    centred = y - y.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
    y = y * op.out_norm.weight + op.out_norm.bias
    if has_gate:
        z = projected[..., 8:].flatten(0, 1)
        y = y * z / (1 + torch.exp(-z))
    expected = (y @ op.out_proj.weight.T).view(1, 3, 4, 6)
    assert_relative(op(hidden), expected)


def test_transposing_the_map_swaps_row_and_column_routes():
    op, x = mixer(), oracles.images(2, 3, 5, 6)
    swapped = copy.deepcopy(op)
    oracles.permute_branches(swapped, (1, 0, 3, 2))
    with torch.no_grad():
        swapped.conv2d.weight.copy_(op.conv2d.weight.transpose(2, 3).clone())
    assert_relative(swapped(x.transpose(1, 2)), op(x).transpose(1, 2))
    with pytest.raises(AssertionError):
        assert_relative(op(x.transpose(1, 2)), op(x).transpose(1, 2))


def test_turning_the_map_round_swaps_routes_and_their_reverses():
    op, x = mixer(), oracles.images(2, 3, 5, 6)
    swapped = copy.deepcopy(op)
    oracles.permute_branches(swapped, (2, 3, 0, 1))
    with torch.no_grad():
        swapped.conv2d.weight.copy_(op.conv2d.weight.flip(2, 3))
    assert_relative(swapped(x.flip(1, 2)), op(x).flip(1, 2))


@pytest.mark.parametrize("has_mlp", [False, True])
def test_block_adds_its_parts_to_the_residual_stream(has_mlp):
    config = dataclasses.replace(SMALL, mlp_ratio=2.0 if has_mlp else 0.0)
    block = oracles.randomised(VMamba(config)).layers[0].blocks[0]
    x = oracles.images(1, 2, 3, 8)
    expected = x + block.op(block.norm(x))
    if has_mlp:
        inner = block.norm2(expected) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        expected = expected + inner @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    assert_relative(block(x), expected)


@pytest.mark.parametrize("patch_embed", PatchEmbed)
@pytest.mark.parametrize(
    ("downsample", "side"), [(Downsample.V1, 4), (Downsample.V2, 3), (Downsample.V3, 4)]
)
def test_maps_keep_their_shape_through_the_model(patch_embed, downsample, side):
    """28 x 32 pixels make 7 x 8 tokens; an odd side is rounded up but by the 2x2 conv."""
    config = dataclasses.replace(SMALL, patch_embed=patch_embed, downsample=downsample)
    model = oracles.randomised(VMamba(config))
    x = model.patch_embed(oracles.images(2, 3, 28, 32))
    assert x.shape == (2, 7, 8, 8)
    assert model.layers[0](x).shape == (2, side, 4, 12)
    assert model(oracles.images(2, 3, 28, 32)).shape == (2, 5)


def test_patch_merging_takes_columns_of_the_square_first():
    config = dataclasses.replace(SMALL, downsample=Downsample.V1)
    merging = oracles.randomised(VMamba(config)).layers[0].downsample
    x = oracles.images(1, 3, 2, 8)
    square = torch.cat([x[0, 0, 0], x[0, 1, 0], x[0, 0, 1], x[0, 1, 1]])
    ragged = torch.cat([x[0, 2, 0], torch.zeros(8), x[0, 2, 1], torch.zeros(8)])
    for row, tokens in enumerate((square, ragged)):
        normed = F.layer_norm(tokens, (32,), merging.norm.weight, merging.norm.bias)
        assert_relative(merging(x)[0, row, 0], merging.reduction.weight @ normed)


def test_an_image_does_not_see_its_batch():
    model, batch = oracles.randomised(VMamba(SMALL)), oracles.images(3, 3, 16, 24)
    assert_relative(model(batch)[1:2], model(batch[1:2]))


def test_the_classifier_averages_the_map():
    model = oracles.randomised(VMamba(SMALL))
    x = oracles.images(1, 2, 3, 12)
    normed = F.layer_norm(x, (12,), model.classifier.norm.weight, model.classifier.norm.bias)
    pooled = normed.flatten(1, 2).mean(1)[0]
    expected = model.classifier.head.weight @ pooled + model.classifier.head.bias
    assert_relative(model.classifier(x)[0], expected)


def test_float32_follows_float64():
    torch.manual_seed(3)
    model, pixels = VMamba(SMALL).requires_grad_(False), oracles.images(1, 3, 16, 16)
    expected = copy.deepcopy(model).double()(pixels)
    assert_relative(model(pixels.float()), expected, torch.float32)


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name):
    config = PRESETS[name]
    assert VMambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (8,)}, r"VMambaConfig.dims: expected as many values as depths \(2\), got \(8,\)"),
        ({"conv_width": 4}, "VMambaConfig.conv_width: expected an odd number, got 4"),
        ({"patch_size": 8}, "VMambaConfig.patch_size: expected 4 with PatchEmbed.V2, got 8"),
        ({"dims": (7, 12)}, "VMambaConfig.dims: expected an even first width"),
        ({"dstate": 0}, "VMambaConfig.dstate: expected more than 0, got 0"),
        ({"depths": (1, -2)}, r"VMambaConfig.depths: expected more than 0, got \(1, -2\)"),
        ({"mlp_ratio": -1.0}, "VMambaConfig.mlp_ratio: expected 0 or more, got -1.0"),
        ({"ssm_ratio": math.inf}, "VMambaConfig.ssm_ratio: expected more than 0, got inf"),
        ({"dstate": 1.5}, "VMambaConfig.dstate: expected int, got 1.5"),
        ({"dt_rank": "auto"}, "VMambaConfig.dt_rank: expected int or None, got 'auto'"),
        ({"has_gate": 1}, "VMambaConfig.has_gate: expected bool, got 1"),
        ({"dstate": True}, "VMambaConfig.dstate: expected int, got True"),
        ({"depths": ()}, "VMambaConfig.depths: expected a tuple of one or more values, each int"),
        ({"downsample": "v9"}, "VMambaConfig.downsample: expected Downsample, one of v1, v2, v3"),
    ],
)
def test_a_bad_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 0}, "VMambaConfig.version: expected 1, got 0"),
        ({"depth": [1]}, "VMambaConfig.depth: unknown field"),
        ({"downsample": "v9"}, "VMambaConfig.downsample: expected Downsample, one of v1, v2, v3"),
    ],
)
def test_bad_plain_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VMambaConfig.from_dict({**SMALL.to_dict(), **changes})


def test_a_missing_field_is_named():
    values = SMALL.to_dict()
    del values["dims"]
    with pytest.raises(ValueError, match=r"VMambaConfig\.dims: missing"):
        VMambaConfig.from_dict(values)


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (3, 16, 16), (1, 3, 16, 3)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"images: expected \(batch, 3, height, width\) with sides"
    ):
        VMamba(SMALL)(torch.zeros(shape))
