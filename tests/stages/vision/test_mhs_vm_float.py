"""MHS-VM in float: the published parameters, the heads' routes, the fusion, and the mixer against plain loops."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch.nn import functional as F

from mambaquant_ext.model.vision.mhs_vm import PRESETS, MHSConfig, MHSUNet, PatchExpand
from mambaquant_ext.model.vision.multi_head_scan import (
    GatedFusion,
    MultiHeadScan,
    Pattern,
    VSSGate,
    VSSUnGated,
    pattern_orders,
)
from stages.vision import oracles
from tolerances import assert_relative

SMALL = MHSConfig(depths=(1, 1), decoder_depths=(1, 1), hidden=12, classes=2, dstate=2)

# The eight walks of a grid of two rows of three, as the public route generator numbers its tokens.
WALKS = {
    Pattern.C: ([0, 1, 2, 5, 4, 3], [0, 3, 4, 1, 2, 5]),
    Pattern.X: ([0, 1, 3, 4, 2, 5], [2, 1, 5, 4, 0, 3]),
    Pattern.S: ([0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0]),
    Pattern.Z: ([0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]),
}


def published_shapes(depths, decoder_depths, first, dstate):
    """The state dict of a published checkpoint with four heads, by the rules of its configuration."""
    shapes = {"patch_embed.proj.weight": (first, 3, 4, 4), "patch_embed.proj.bias": (first,)}

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def block(name, width):
        dim, rank = width // 4, math.ceil(width / 4 / 16)
        norm(f"{name}.ln_1", width)
        mixer = f"{name}.self_attention"
        shapes[f"{mixer}.in_proj.weight"] = (2 * width, width)
        shapes[f"{mixer}.conv2d.weight"] = (width, 1, 3, 3)
        shapes[f"{mixer}.conv2d.bias"] = (width,)
        norm(f"{mixer}.out_norm", width)
        norm(f"{mixer}.mhs.cat_norm", width)
        for projection in ("x_ssproj_W", "x_ssproj.weight", "y_proj.weight"):
            shapes[f"{mixer}.mhs.{projection}"] = (width, width)
        for head in "CXSZ":
            for engine in ("mambaeng", "scanning.seq2seq_engine"):
                where = f"{mixer}.mhs.scanhead_{head}.{engine}"
                shapes[f"{where}.x_proj_weight"] = (4, rank + 2 * dstate, dim)
                shapes[f"{where}.dt_projs_weight"] = (4, dim, rank)
                shapes[f"{where}.dt_projs_bias"] = (4, dim)
                shapes[f"{where}.A_logs"] = (4 * dim, dstate)
                shapes[f"{where}.Ds"] = (4 * dim,)

    norm("patch_embed.norm", first)
    last = len(depths) - 1
    for i in range(len(depths)):
        width = first * 2**i
        for j in range(depths[i]):
            block(f"layers.{i}.blocks.{j}", width)
        if i < last:
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * width, 4 * width)
            norm(f"layers.{i}.downsample.norm", 4 * width)
        width = first * 2 ** (last - i)
        for j in range(decoder_depths[i]):
            block(f"layers_up.{i}.blocks.{j}", width)
        if i > 0:
            shapes[f"layers_up.{i}.upsample.expand.weight"] = (4 * width, 2 * width)
            norm(f"layers_up.{i}.upsample.norm", width)
    shapes["final_up.expand.weight"] = (4 * first, first)
    norm("final_up.norm", first // 4)
    return shapes | {"final_conv.weight": (1, first // 4, 1, 1), "final_conv.bias": (1,)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_parameters(name):
    with torch.device("meta"):
        model = MHSUNet(PRESETS[name])
    assert oracles.shapes(model) == published_shapes((2, 2, 2, 2), (2, 2, 2, 1), 96, 16)


def test_parameters_under_two_names_are_one():
    scan = MHSUNet(SMALL).layers[0].blocks[0].self_attention.mhs
    assert scan.x_ssproj_W is scan.x_ssproj.weight
    for head in scan.heads:
        assert head.scanning.seq2seq_engine is head.mambaeng


@pytest.mark.parametrize("pattern", Pattern)
def test_walks_of_a_small_map(pattern):
    assert tuple(walk.tolist() for walk in pattern_orders(pattern, 2, 3)) == WALKS[pattern]


def fused(routes, threshold):
    """What the fusion does to one channel of one token, as a list of its routes' values."""
    mean = sum(routes) / 4
    deviation = math.sqrt(sum((value - mean) ** 2 for value in routes) / 3)
    variation = deviation / (mean - min(routes) + 1e-5)
    return sum(routes) * max(variation - threshold, 0.0)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.5])
def test_fusion_gates_by_the_coefficient_of_variation(threshold):
    y = oracles.images(4, 1, 6, 5)
    expected = [
        [fused(y[:, 0, token, channel].tolist(), threshold) for channel in range(5)]
        for token in range(6)
    ]
    assert_relative(GatedFusion(threshold)(y)[0], torch.tensor(expected, dtype=torch.float64))


def test_fusion_of_routes_that_agree_is_zero():
    assert torch.equal(GatedFusion(0.0)(torch.ones(4, 1, 2, 3)), torch.zeros(1, 2, 3))


def scan_module(heads, has_projection, hidden=12):
    return MultiHeadScan(
        hidden=hidden, heads=heads, dstate=3, threshold=0.4, has_projection=has_projection
    )


def scan_by_loops(scan, x, grid_walks):
    """The multi-head scan of x (tokens, hidden), with plain loops."""
    parts = (x @ scan.x_ssproj.weight.T).chunk(len(scan.heads), -1)
    outputs = []
    for head, pattern, part in zip(scan.heads, "CXSZ", parts, strict=False):
        first, second = grid_walks[Pattern(pattern)]
        routes = torch.stack(
            [
                oracles.branch_scan(part, walk, *oracles.branch_weights(head.mambaeng, branch))
                for branch, walk in enumerate((first, first[::-1], second, second[::-1]))
            ]
        )
        fusion = [
            [fused(column, 0.4) for column in routes[:, token].T.tolist()]
            for token in range(len(part))
        ]
        outputs.append(torch.tensor(fusion, dtype=torch.float64))
    y = torch.cat(outputs, -1)
    if scan.has_projection:
        y = layer_norm(y, scan.cat_norm) @ scan.y_proj.weight.T
    return y


def layer_norm(x, norm):
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)


@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("has_projection", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
def test_mixer_equals_plain_loops(heads, has_projection, is_gated):
    scan = scan_module(heads, has_projection)
    mixer = oracles.randomised((VSSGate if is_gated else VSSUnGated)(12, scan))
    hidden = oracles.images(1, 2, 3, 12)
    x, z = (hidden @ mixer.in_proj.weight.T).chunk(2, -1) if is_gated else (hidden, None)
    conv = F.conv2d(x.permute(0, 3, 1, 2), mixer.conv2d.weight, mixer.conv2d.bias, 1, 1, 1, 12)
    x = F.silu(conv)[0].flatten(1).T
    expected = layer_norm(scan_by_loops(mixer.mhs, x, WALKS), mixer.out_norm).view(1, 2, 3, 12)
    if is_gated:
        expected = expected * F.silu(z)
    assert_relative(mixer(hidden), expected)


def test_channels_that_no_head_takes_are_projected_away():
    """13 channels make three heads of four."""
    scan = oracles.randomised(scan_module(3, True, hidden=13))
    assert scan.x_ssproj.weight.shape == (12, 13)
    assert scan(oracles.images(1, 2, 3, 13)).shape == (1, 2, 3, 13)


def test_block_adds_to_the_residual_stream():
    block = oracles.randomised(MHSUNet(SMALL)).layers[0].blocks[0]
    x = oracles.images(1, 2, 3, 12)
    assert_relative(block(x), x + block.self_attention(layer_norm(x, block.ln_1)))


def test_expanding_lays_a_token_out_as_rows_of_columns():
    expand = oracles.randomised(PatchExpand(6, 3, 2))
    x = oracles.images(1, 2, 3, 6)
    y = expand(x)
    assert y.shape == (1, 4, 6, 3)
    for p in range(2):
        for q in range(2):
            rows = expand.expand.weight[(2 * p + q) * 3 : (2 * p + q + 1) * 3]
            assert_relative(y[:, p::2, q::2], layer_norm(x @ rows.T, expand.norm))


def test_decoder_adds_the_encoder_maps():
    model = oracles.randomised(MHSUNet(SMALL))
    pixels = oracles.images(2, 3, 16, 24)
    first = model.patch_embed(pixels)
    second = model.layers[0](first)
    assert second.shape == (2, 2, 3, 24)
    deep = model.layers_up[0](model.layers[1](second))
    x = model.final_up(model.layers_up[1](deep + second))
    expected = F.conv2d(x.permute(0, 3, 1, 2), model.final_conv.weight, model.final_conv.bias)
    assert expected.shape == (2, 2, 16, 24)
    assert_relative(model(pixels), expected)


def test_an_image_does_not_see_its_batch():
    model, batch = oracles.randomised(MHSUNet(SMALL)), oracles.images(2, 3, 8, 16)
    assert_relative(model(batch)[1:], model(batch[1:]))


def test_float32_follows_float64():
    """With random weights: the fusion divides differences of routes by each other, and at the start they agree."""
    model, pixels = oracles.randomised(MHSUNet(SMALL)), oracles.images(1, 3, 16, 8)
    single = copy.deepcopy(model).float()
    assert_relative(single(pixels.float()), model(pixels), torch.float32)


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name):
    config = PRESETS[name]
    assert MHSConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_depths": (1,)}, r"decoder_depths: expected as many values as depths \(2\)"),
        ({"heads": 5}, "MHSConfig.heads: expected 3 or 4, got 5"),
        ({"hidden": 14}, r"MHSConfig.hidden: expected a multiple of patch_size \(4\), got 14"),
        (
            {"hidden": 16, "heads": 3, "has_projection": False},
            r"hidden: expected a multiple of heads \(3\) without a projection, got 16",
        ),
        ({"hidden": 2, "patch_size": 2}, r"expected at least a channel a head \(4\), got 2"),
        ({"gate_threshold": -0.5}, "MHSConfig.gate_threshold: expected 0 or more, got -0.5"),
    ],
)
def test_a_bad_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 16, 16), r"expected \(batch, 3, height, width\) with sides of 8 or more"),
        ((1, 3, 16, 20), r"expected sides that are multiples of 8, got \(1, 3, 16, 20\)"),
    ],
)
def test_what_the_stages_cannot_divide_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        MHSUNet(SMALL)(torch.zeros(shape))
