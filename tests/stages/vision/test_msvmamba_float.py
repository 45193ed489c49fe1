"""MSVMamba in float: the published parameters, the two scales, and the mixer against plain loops."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch.nn import functional as F

from mambaquant_ext.model.vision.msvmamba import (
    COARSE,
    PRESETS,
    MSVMamba,
    MSVMambaConfig,
    MultiScaleSS2D,
    coarse_merge,
    coarse_scan,
)
from stages.vision import oracles
from tolerances import assert_relative

SMALL = MSVMambaConfig(depths=(1, 1), dims=(6, 8), classes=5, dstate=2, se_reduction=3)


def published_shapes(depths, first):
    """The state dict of a published checkpoint, by the rules of its configuration."""
    shapes = {"patch_embed.0.weight": (first, 3, 4, 4)}
    for name in ("patch_embed.0.bias", "patch_embed.2.weight", "patch_embed.2.bias"):
        shapes[name] = (first,)
    for i, depth in enumerate(depths):
        width = first * 2**i
        dim, rank = 2 * width, math.ceil(width / 16)
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            for norm in ("norm", "norm2"):
                shapes |= {f"{block}.{norm}.{part}": (width,) for part in ("weight", "bias")}
            shapes |= {
                f"{block}.op.in_proj.weight": (2 * dim, width),
                f"{block}.op.conv2d.weight": (dim, 1, 3, 3),
                f"{block}.op.conv2d.bias": (dim,),
                f"{block}.op.conv2d_b1.weight": (dim, 1, 7, 7),
                f"{block}.op.conv2d_b1.bias": (dim,),
                f"{block}.op.x_proj_weight": (2, rank + 2, dim),
                f"{block}.op.dt_projs_weight": (2, dim, rank),
                f"{block}.op.dt_projs_bias": (2, dim),
                f"{block}.op.A_logs": (2 * dim, 1),
                f"{block}.op.Ds": (2 * dim,),
                f"{block}.op.out_norm.weight": (dim,),
                f"{block}.op.out_norm.bias": (dim,),
                f"{block}.op.se.fc.0.weight": (dim // 8, dim),
                f"{block}.op.se.fc.2.weight": (dim, dim // 8),
                f"{block}.op.out_proj.weight": (width, dim),
                f"{block}.convFFN.linear1.weight": (2 * width, width, 1, 1),
                f"{block}.convFFN.linear1.bias": (2 * width,),
                f"{block}.convFFN.dwc.weight": (2 * width, 1, 3, 3),
                f"{block}.convFFN.dwc.bias": (2 * width,),
                f"{block}.convFFN.linear2.weight": (width, 2 * width, 1, 1),
                f"{block}.convFFN.linear2.bias": (width,),
            }
        if i + 1 < len(depths):
            merging = f"layers.{i}.downsample"
            shapes[f"{merging}.reduction.weight"] = (2 * width, 4 * width)
            shapes |= {f"{merging}.norm.{part}": (4 * width,) for part in ("weight", "bias")}
    shapes |= {f"classifier.norm.{part}": (width,) for part in ("weight", "bias")}
    return shapes | {"classifier.head.weight": (1000, width), "classifier.head.bias": (1000,)}


@pytest.mark.parametrize(
    ("name", "depths", "first", "millions", "digits"),
    [
        ("nano", (1, 2, 5, 2), 48, 6.86, 2),
        ("micro", (1, 2, 5, 2), 64, 11.88, 2),
        ("tiny", (1, 2, 9, 2), 96, 33, 0),
    ],
)
def test_a_preset_has_the_published_parameters(name, depths, first, millions, digits):
    with torch.device("meta"):
        model = MSVMamba(PRESETS[name])
    assert oracles.shapes(model) == published_shapes(depths, first)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, digits) == millions


def coarse_order(height, width):
    rows = [i * width + j for i in range(height) for j in range(width)]
    columns = [i * width + j for j in range(width) for i in range(height)]
    return [*rows[::-1], *columns, *columns[::-1]]


def test_the_coarse_routes_follow_each_other():
    grid = torch.arange(6.0).view(1, 2, 3, 1)
    assert coarse_scan(grid).flatten().int().tolist() == coarse_order(2, 3)
    assert coarse_order(2, 3) == [5, 4, 3, 2, 1, 0, 0, 3, 1, 4, 2, 5, 5, 2, 4, 1, 3, 0]


def test_coarse_merge_puts_every_route_back():
    x = oracles.images(2, 3, 5, 4)
    routes = coarse_scan(x)
    assert_relative(coarse_merge(routes, 3, 5), 3 * x)
    for kept in range(3):
        alone = torch.zeros_like(routes)
        alone[:, 15 * kept : 15 * (kept + 1)] = routes[:, 15 * kept : 15 * (kept + 1)]
        assert torch.equal(coarse_merge(alone, 3, 5), x)


def mixer():
    return oracles.randomised(
        MultiScaleSS2D(
            hidden=6,
            dim=8,
            dt_rank=2,
            dstate=3,
            conv_width=3,
            coarse_conv_width=7,
            se_bottleneck=3,
        )
    )


def layer_norm(x, norm):
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)


def triangle_weights(small, large):
    """(large, small): bilinear interpolation of half-pixel centres, the border repeated."""
    weights = torch.zeros(large, small, dtype=torch.float64)
    for i in range(large):
        centre = max((i + 0.5) * small / large - 0.5, 0.0)
        left = min(math.floor(centre), small - 1)
        right = min(left + 1, small - 1)
        weights[i, left] += 1 - (centre - left)
        weights[i, right] += centre - left
    return weights


def test_mixer_equals_plain_loops():
    op, hidden = mixer(), oracles.images(1, 5, 4, 6)
    projected = hidden[0] @ op.in_proj.weight.T
    x, z = projected.split(8, -1)
    channels_first = x.permute(2, 0, 1)
    fine = F.silu(F.conv2d(channels_first, op.conv2d.weight, op.conv2d.bias, 1, 1, 1, 8))
    strided = F.conv2d(channels_first, op.conv2d_b1.weight, op.conv2d_b1.bias, 1, 3, 1, 8)
    coarse = F.silu(strided[:, ::2, ::2])
    assert coarse.shape == (8, 3, 2)

    fine = fine.flatten(1).T
    y = oracles.branch_scan(fine, range(20), *oracles.branch_weights(op, 1))
    y = layer_norm(y, op.out_norm).view(5, 4, 8)

    # Three copies of the coarse map, one after the other: a walk through all of them carries its state on.
    order = coarse_order(3, 2)
    copies = torch.cat([coarse.flatten(1).T] * 3)
    walk = [token + 6 * (step // 6) for step, token in enumerate(order)]
    scanned = oracles.branch_scan(copies, walk, *oracles.branch_weights(op, 0))
    summed = layer_norm(scanned, op.out_norm).view(3, 3, 2, 8).sum(0)
    rows, columns = triangle_weights(3, 5), triangle_weights(2, 4)
    y = y + torch.einsum("ih,jw,hwd->ijd", rows, columns, summed)

    squeezed = torch.relu(op.se.fc[0].weight @ y.mean((0, 1)))
    y = y * torch.sigmoid(op.se.fc[2].weight @ squeezed)
    expected = (y * F.silu(z)) @ op.out_proj.weight.T
    assert_relative(op(hidden)[0], expected)


def test_the_state_is_carried_from_one_coarse_route_to_the_next():
    op, x = mixer(), oracles.images(1, 2, 3, 8)
    whole = op.scan_branch(COARSE, coarse_scan(x))
    apart = [op.scan_branch(COARSE, route) for route in coarse_scan(x).chunk(3, 1)]
    assert_relative(whole[:, :6], apart[0])
    with pytest.raises(AssertionError):
        assert_relative(whole[:, 6:12], apart[1])


def test_block_adds_its_parts_to_the_residual_stream():
    block = oracles.randomised(MSVMamba(SMALL)).layers[0].blocks[0]
    x = oracles.images(1, 3, 4, 6)
    expected = x + block.op(layer_norm(x, block.norm))
    ffn = block.convFFN
    v = layer_norm(expected, block.norm2) @ ffn.linear1.weight[:, :, 0, 0].T + ffn.linear1.bias
    mixed = F.conv2d(v.permute(0, 3, 1, 2), ffn.dwc.weight, ffn.dwc.bias, 1, 1, 1, 12)
    v = F.gelu(v + mixed.permute(0, 2, 3, 1))
    expected = expected + v @ ffn.linear2.weight[:, :, 0, 0].T + ffn.linear2.bias
    assert_relative(block(x), expected)


def test_maps_keep_their_shape_through_the_model():
    model = oracles.randomised(MSVMamba(SMALL))
    pixels = oracles.images(2, 3, 28, 36)
    x = model.patch_embed(pixels)
    assert x.shape == (2, 7, 9, 6)
    assert model.layers[0](x).shape == (2, 4, 5, 8)
    assert model(pixels).shape == (2, 5)
    assert_relative(model(pixels)[1:], model(pixels[1:]))


def test_a_map_of_one_token_is_enough():
    assert oracles.randomised(MSVMamba(SMALL))(oracles.images(1, 3, 4, 4)).isfinite().all()


def test_float32_follows_float64():
    torch.manual_seed(3)
    model, pixels = MSVMamba(SMALL).requires_grad_(False), oracles.images(1, 3, 16, 20)
    expected = copy.deepcopy(model).double()(pixels)
    assert_relative(model(pixels.float()), expected, torch.float32)


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name):
    config = PRESETS[name]
    assert MSVMambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (8,)}, r"MSVMambaConfig.dims: expected as many values as depths \(2\), got"),
        ({"conv_width": 4}, "MSVMambaConfig.conv_width: expected an odd number, got 4"),
        ({"coarse_conv_width": 6}, "coarse_conv_width: expected an odd number, got 6"),
        ({"se_reduction": 13}, "se_reduction: expected no more than the smallest inner width"),
        ({"ffn_ratio": 0}, "MSVMambaConfig.ffn_ratio: expected more than 0, got 0"),
    ],
)
def test_a_bad_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (3, 16, 16), (1, 3, 16, 3)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"images: expected \(batch, 3, height, width\) with sides"
    ):
        MSVMamba(SMALL)(torch.zeros(shape))
