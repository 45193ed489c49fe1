"""The U-Nets in float: U-Mamba's and MambaMIM's parameters, the mixer and its layers against plain loops."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
from torch.nn import functional as F

from mambaquant_ext.model.vision.mamba_mixer import MambaLayer, MambaMixer
from mambaquant_ext.model.vision.mambamim import (
    MambaBottleneck,
    MambaMlpBlock,
    from_published,
    sincos_positions,
)
from mambaquant_ext.model.vision.unet import MambaUNet, Placement, ResidualBlock, UNetConfig
from stages.vision import oracles
from tolerances import assert_relative

SMALL = UNetConfig(
    features=(4, 6, 12), image_size=(8, 4, 12), image_channels=2, classes=3, dstate=2
)
SIZES = [(8, 4, 12), (4, 2, 6), (2, 1, 3)]  # after each stage


def mixer_shapes(name, hidden, dstate=2):
    """What a mamba_ssm.Mamba of default options has."""
    dim, rank = 2 * hidden, math.ceil(hidden / 16)
    return {
        f"{name}.in_proj.weight": (2 * dim, hidden),
        f"{name}.conv1d.weight": (dim, 1, 4),
        f"{name}.conv1d.bias": (dim,),
        f"{name}.x_proj.weight": (rank + 2 * dstate, dim),
        f"{name}.dt_proj.weight": (dim, rank),
        f"{name}.dt_proj.bias": (dim,),
        f"{name}.A_log": (dim, dstate),
        f"{name}.D": (dim,),
        f"{name}.out_proj.weight": (hidden, dim),
    }


def layer_shapes(name, hidden):
    norm = {f"{name}.norm.weight": (hidden,), f"{name}.norm.bias": (hidden,)}
    return norm | mixer_shapes(f"{name}.mamba", hidden)


def block_shapes(name, channels, out):
    shapes = {f"{name}.conv1.weight": (out, channels, 3, 3, 3)}
    shapes[f"{name}.conv2.weight"] = (out, out, 3, 3, 3)
    shapes[f"{name}.conv3.weight"] = (out, channels, 1, 1, 1)
    for part in ("conv1.bias", "conv2.bias", "conv3.bias"):
        shapes[f"{name}.{part}"] = (out,)
    for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
        shapes[f"{name}.{part}"] = (out,)
    return shapes


def net_shapes():
    """U-Mamba's encoder and decoder of SMALL, with one residual block a stage."""
    shapes = block_shapes("encoder.stem.0", 2, 4)
    for stage, (channels, out) in enumerate([(4, 4), (4, 6), (6, 12)]):
        shapes |= block_shapes(f"encoder.stages.{stage}.0", channels, out)
    for stage, (below, skip) in enumerate([(12, 6), (6, 4)]):
        shapes[f"decoder.upsample_layers.{stage}.conv.weight"] = (skip, below, 1, 1, 1)
        shapes[f"decoder.upsample_layers.{stage}.conv.bias"] = (skip,)
        shapes |= block_shapes(f"decoder.stages.{stage}.0", 2 * skip, skip)
        shapes[f"decoder.seg_layers.{stage}.weight"] = (3, skip, 1, 1, 1)
        shapes[f"decoder.seg_layers.{stage}.bias"] = (3,)
    return shapes


def mim_shapes():
    shapes = {"mae.pos_embed": (1, 6, 12)}
    for block in ("mae.blocks.0", "mae.blocks.1"):
        shapes |= mixer_shapes(f"{block}.mamba", 12)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mlp.fc2.bias"):
            shapes[f"{block}.{name}"] = (12,)
        shapes[f"{block}.mlp.fc1.weight"] = (24, 12)
        shapes[f"{block}.mlp.fc1.bias"] = (24,)
        shapes[f"{block}.mlp.fc2.weight"] = (12, 24)
    return shapes


# Channel tokens in the last stage: 2 x 1 x 3 voxels are no more than 12 channels.
LAYERS = {
    Placement.BOTTLENECK: layer_shapes("mamba_layer", 12),
    Placement.ENCODER: {
        **layer_shapes("encoder.mamba_layers.0", 4),
        **layer_shapes("encoder.mamba_layers.1", 6),
        **layer_shapes("encoder.mamba_layers.2", 6),
    },
    Placement.MIM: mim_shapes(),
}

placements = pytest.mark.parametrize("placement", Placement)


@placements
def test_parameters_have_the_published_names_and_shapes(placement):
    with torch.device("meta"):
        model = MambaUNet(dataclasses.replace(SMALL, placement=placement))
    assert oracles.shapes(model) == net_shapes() | LAYERS[placement]


def test_a_mixer_is_a_mamba_of_default_options():
    with torch.device("meta"):
        shapes = oracles.shapes(MambaMixer(40))
    assert {f"m.{name}": shape for name, shape in shapes.items()} == mixer_shapes("m", 40, 16)


def mixer_by_loops(mixer, tokens):
    """The mixer over tokens (seqlen, hidden), conv and scan as plain loops."""
    x, z = (tokens @ mixer.in_proj.weight.T).chunk(2, -1)
    conv = mixer.conv1d.bias.repeat(len(x), 1)
    width = mixer.conv1d.weight.shape[2]
    for t, tap in itertools.product(range(len(x)), range(width)):
        if t >= tap:
            conv[t] += mixer.conv1d.weight[:, 0, width - 1 - tap] * x[t - tap]
    x = conv / (1 + torch.exp(-conv))
    y = oracles.branch_scan(
        x,
        range(len(x)),
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        mixer.dt_proj.bias,
        mixer.A_log,
        mixer.D,
    )
    return (y * z / (1 + torch.exp(-z))) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("seqlen", [1, 2, 11])
def test_mixer_equals_plain_loops(seqlen):
    mixer = oracles.randomised(MambaMixer(5, 3))
    tokens = oracles.images(1, seqlen, 5)
    assert_relative(mixer(tokens)[0], mixer_by_loops(mixer, tokens[0]))


def test_mixer_is_causal():
    mixer, tokens = oracles.randomised(MambaMixer(5, 3)), oracles.images(1, 9, 5)
    assert_relative(mixer(tokens[:, :6]), mixer(tokens)[:, :6])


def layer_norm(x, norm):
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)


def test_layer_takes_voxels_as_tokens_row_by_row():
    layer = oracles.randomised(MambaLayer(5, dstate=2, conv_width=4, expand=2))
    x = oracles.images(1, 5, 2, 3, 2)
    voxels = [x[0, :, i, j, k] for i in range(2) for j in range(3) for k in range(2)]
    expected = mixer_by_loops(layer.mamba, layer_norm(torch.stack(voxels), layer.norm))
    assert_relative(layer(x)[0], expected.T.reshape(5, 2, 3, 2))


def test_layer_with_channel_tokens_walks_over_channels():
    layer = oracles.randomised(MambaLayer(6, dstate=2, conv_width=4, expand=2, channel_token=True))
    x = oracles.images(1, 9, 1, 3, 2)
    expected = mixer_by_loops(layer.mamba, layer_norm(x[0].reshape(9, 6), layer.norm))
    assert_relative(layer(x)[0], expected.view(9, 1, 3, 2))


def test_channel_tokens_where_a_map_has_no_more_voxels_than_channels():
    model = MambaUNet(dataclasses.replace(SMALL, placement=Placement.ENCODER))
    assert [layer.channel_token for layer in model.encoder.mamba_layers] == [False, False, True]
    as_many = dataclasses.replace(SMALL, placement=Placement.ENCODER, features=(4, 6, 6))
    assert MambaUNet(as_many).encoder.mamba_layers[2].channel_token


@pytest.mark.parametrize("stride", [1, 2])
def test_residual_block_equals_its_formula(stride):
    block = oracles.randomised(ResidualBlock(2, 3, stride))
    x = oracles.images(1, 2, 4, 2, 6)

    def norm(y, layer):
        y = y - y.mean((2, 3, 4), keepdim=True)
        y = y / torch.sqrt(y.pow(2).mean((2, 3, 4), keepdim=True) + 1e-5)
        return y * layer.weight[:, None, None, None] + layer.bias[:, None, None, None]

    def leaky(y):
        return torch.where(y > 0, y, 0.01 * y)

    y = leaky(norm(F.conv3d(x, block.conv1.weight, block.conv1.bias, stride, 1), block.norm1))
    y = norm(F.conv3d(y, block.conv2.weight, block.conv2.bias, 1, 1), block.norm2)
    skip = torch.einsum("oc,bcijk->boijk", block.conv3.weight[:, :, 0, 0, 0], x)
    skip = skip[:, :, ::stride, ::stride, ::stride] + block.conv3.bias[:, None, None, None]
    assert_relative(block(x), leaky(y + skip))


@placements
def test_layers_are_where_the_placement_puts_them(placement):
    model = oracles.randomised(MambaUNet(dataclasses.replace(SMALL, placement=placement)))
    pixels = oracles.images(2, 2, 8, 4, 12)
    x, maps = model.encoder.stem(pixels), []
    for index, stage in enumerate(model.encoder.stages):
        x = stage(x)
        if placement is Placement.ENCODER:
            x = model.encoder.mamba_layers[index](x)
        assert x.shape[2:] == SIZES[index]
        maps.append(x)
    if placement is Placement.BOTTLENECK:
        x = model.mamba_layer(x)
    if placement is Placement.MIM:
        x = model.mae(x)
    for index in range(2):
        larger = x
        for axis in (2, 3, 4):
            larger = larger.repeat_interleave(2, axis)
        larger = model.decoder.upsample_layers[index].conv(larger)
        x = model.decoder.stages[index](torch.cat([larger, maps[1 - index]], 1))
    expected = model.decoder.seg_layers[1](x)
    assert expected.shape == (2, 3, 8, 4, 12)
    assert_relative(model(pixels), expected)


def test_bottleneck_adds_positions_and_keeps_the_residual_stream():
    bottleneck = oracles.randomised(MambaBottleneck(6, (2, 1, 2), 1, 2, 4, 2))
    block = bottleneck.blocks[0]
    x = oracles.images(1, 6, 2, 1, 2)
    tokens = x[0].reshape(6, 4).T + bottleneck.pos_embed[0]
    tokens = tokens + mixer_by_loops(block.mamba, layer_norm(tokens, block.norm1))
    v = F.gelu(layer_norm(tokens, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    tokens = tokens + v @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    assert_relative(bottleneck(x)[0], tokens.T.reshape(6, 2, 1, 2))


def test_positions_are_sines_and_cosines_of_each_axis():
    positions = sincos_positions((2, 3, 4), 12)
    assert positions.shape == (1, 24, 12)
    for i, j, k in itertools.product(range(2), range(3), range(4)):
        expected = []
        for place in (i, j, k):
            angles = [place, place / 100]  # frequencies 10000^0 and 10000^(-1/2)
            expected += [*map(math.sin, angles), *map(math.cos, angles)]
        assert positions[0, 12 * i + 4 * j + k].tolist() == pytest.approx(expected, abs=1e-6)


def test_positions_are_not_trained():
    model = MambaUNet(dataclasses.replace(SMALL, placement=Placement.MIM))
    assert not model.mae.pos_embed.requires_grad


def test_weights_of_a_direction_that_is_never_scanned_are_left_out():
    state = MambaMlpBlock(6, 2, 4, 2).state_dict()
    unused = ["A_b_log", "D_b", "conv1d_b.weight", "x_proj_b.weight", "dt_proj_b.bias"]
    published = {**state, **{f"mamba.{name}": torch.zeros(1) for name in unused}}
    assert list(from_published(published)) == list(state)
    whole = MambaUNet(dataclasses.replace(SMALL, placement=Placement.MIM)).state_dict()
    extra = {f"mae.blocks.1.mamba.{name}": torch.zeros(1) for name in unused}
    assert list(from_published({**whole, **extra})) == list(whole)


@placements
def test_an_image_does_not_see_its_batch(placement):
    model = oracles.randomised(MambaUNet(dataclasses.replace(SMALL, placement=placement)))
    batch = oracles.images(2, 2, 8, 4, 12)
    assert_relative(model(batch)[1:], model(batch[1:]))


def test_float32_follows_float64():
    model, pixels = oracles.randomised(MambaUNet(SMALL)), oracles.images(1, 2, 8, 4, 12)
    assert_relative(copy.deepcopy(model).float()(pixels.float()), model(pixels), torch.float32)


@placements
def test_config_survives_json(placement):
    config = dataclasses.replace(SMALL, placement=placement)
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": (4,), "strides": (1,)}, "features: expected two stages or more, got"),
        ({"strides": (1, 2)}, r"strides: expected as many values as features \(3\), got"),
        ({"image_size": (8, 8)}, r"image_size: expected three sides, got \(8, 8\)"),
        ({"image_size": (8, 8, 6)}, r"multiples of the product of the strides \(4\), got"),
        (
            {"features": (4, 6, 8), "placement": Placement.MIM},
            "features: expected a multiple of 6 in the last stage with Placement.MIM, got",
        ),
        ({"placement": "top"}, "placement: expected Placement, one of bottleneck, encoder, mim"),
    ],
)
def test_a_bad_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("shape", [(1, 1, 8, 4, 12), (1, 2, 8, 4, 8), (2, 8, 4, 12)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images: expected \(batch, 2, 8, 4, 12\), got"):
        MambaUNet(SMALL)(torch.zeros(shape))
