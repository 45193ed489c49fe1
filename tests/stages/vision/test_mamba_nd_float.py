"""Mamba-ND in float: the names of the public checkpoints, and the block of algorithm section 1.4."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from mambaquant_ext.model.vision import Factorization, MambaND, MambaNDConfig, MambaNDEncoder
from mambaquant_ext.model.vision.mamba_nd import MambaNDBlock, PatchMerging
from mambaquant_ext.model.vision.mamba_nd_config import (
    MAMBA_2D_B,
    MAMBA_2D_S,
    MAMBA_3D_S,
    MAMBA_3D_S_ENCODER,
)
from reference import vision as reference
from stages.vision.float_models import (
    mixer_shapes,
    parameters,
    patch_rows,
    prefixed,
    random_model,
    shapes_on_meta,
)
from tolerances import assert_relative


def config(input_size, patch_size, **changes):
    values = {
        "embed_dim": 12,
        "depth": 4,
        "num_classes": 3,
        "channels": 2,
        "d_state": 4,
        "d_conv": 3,
        "mean": (0.4, 0.5),
        "std": (0.2, 0.3),
    }
    return MambaNDConfig(input_size=input_size, patch_size=patch_size, **{**values, **changes})


def volume(**changes):
    """Two frames of three by two patches."""
    return config((4, 9, 6), (2, 3, 3), **{"depth": 6, **changes})


# Four by six patches, two by three after layer 1.
IMAGE = config((8, 18), (2, 3), downsample=(1,), final_norm=True, pooled_norm=True)
CLASSIFIERS = {
    "image-merging": IMAGE,
    "image-plain": config((6, 6), (2, 2), norm_epsilon=1e-2, depth=2),
    "image-first-norm": config((6, 4), (2, 2), depth=1, final_norm=True, final_norm_epsilon=0.1),
    "video": volume(),
    "video-hw_t": volume(factorization=Factorization.HW_T),
    "video-h_w_t": volume(factorization=Factorization.H_W_T),
}
ENCODER = volume(num_classes=0, out_indices=(0, 3, 4))
classifiers = pytest.mark.parametrize("config", CLASSIFIERS.values(), ids=CLASSIFIERS.keys())


def official_shapes(config, hidden, tokens, merged_layers, prefix=""):
    norm = {"weight": (hidden,), "bias": (hidden,)}
    patch = config.patch_size
    shapes = {
        "patch_embed.projection.weight": (hidden, config.channels, *patch),
        "patch_embed.projection.bias": (hidden,),
        "pos_embed": (1, tokens, hidden),
    }
    for index in range(config.depth):
        mixer = mixer_shapes(hidden, 2 * hidden, config.d_state, width=config.d_conv)
        shapes |= prefixed(f"layers.{index}.mixer", mixer)
        shapes |= prefixed(f"layers.{index}.norm", norm)
    for index in merged_layers:
        wide = {
            "norm.weight": (4 * hidden,),
            "norm.bias": (4 * hidden,),
            "reduction.weight": (hidden, 4 * hidden),
        }
        shapes |= prefixed(f"layers.{index}.down_sample_layer", wide)
    if config.final_norm:
        shapes |= prefixed("ln1", norm)
    if config.pooled_norm:
        shapes |= prefixed("ln2", norm)
    return prefixed(prefix, shapes) if prefix else shapes


def head_shapes(name, hidden, classes):
    return {f"{name}.weight": (classes, hidden), f"{name}.bias": (classes,)}


@pytest.mark.parametrize(("config", "hidden"), [(MAMBA_2D_S, 384), (MAMBA_2D_B, 768)])
def test_a_published_image_model_has_the_official_names_and_shapes(config, hidden):
    shapes, _ = shapes_on_meta(MambaND, config)
    expected = official_shapes(config, hidden, 784, [9], "backbone")
    assert (config.depth, config.d_state, config.patch_size) == (24, 16, (8, 8))
    assert "backbone.ln1.weight" in expected
    assert "backbone.ln2.weight" in expected
    assert shapes == expected | head_shapes("head.fc", hidden, 1000)


def test_the_published_video_model_has_the_official_names_and_shapes():
    shapes, _ = shapes_on_meta(MambaND, MAMBA_3D_S)
    expected = official_shapes(MAMBA_3D_S, 384, 16 * 14 * 14, [], "backbone")
    assert (MAMBA_3D_S.depth, MAMBA_3D_S.patch_size) == (36, (2, 16, 16))
    assert not any(".ln" in name for name in expected)
    assert shapes == expected | head_shapes("cls_head.fc_cls", 384, 400)


def test_the_published_encoder_has_the_official_names_and_shapes():
    shapes, _ = shapes_on_meta(MambaNDEncoder, MAMBA_3D_S_ENCODER)
    assert (MAMBA_3D_S_ENCODER.depth, MAMBA_3D_S_ENCODER.channels) == (24, 1)
    assert shapes == official_shapes(MAMBA_3D_S_ENCODER, 384, 6**3, [])


@pytest.mark.parametrize(("config", "millions"), [(MAMBA_2D_S, 24), (MAMBA_2D_B, 92)])
def test_without_the_merging_a_model_has_the_number_of_parameters_that_the_paper_gives(
    config, millions
):
    plain = dataclasses.replace(config, downsample=())
    assert round(shapes_on_meta(MambaND, plain)[1] / 1e6) == millions


def walks(config, index, grid):
    """The tokens of each walk of a layer, from nested loops in the order of the documentation."""

    def token(indices):
        flat = 0
        for size, position in zip(grid, indices, strict=True):
            flat = flat * size + position
        return flat

    if len(grid) == 2:
        axes = ["hw", "wh"][index % 4 >= 2]
        letters, batch = "hw", 0
    else:
        turn = index // 2 % 3
        axes, letters = ["thw", "twh", "wht"][turn], "thw"
        batch = {"none": (0, 0, 0), "hw_t": (1, 1, 0), "h_w_t": (2, 2, 2)}[
            config.factorization.value
        ][turn]
    found = {}
    for indices in itertools.product(*(range(grid[letters.index(axis)]) for axis in axes)):
        named = dict(zip(axes, indices, strict=True))
        found.setdefault(indices[:batch], []).append(token([named[axis] for axis in letters]))
    return [walk[::-1] if index % 2 else walk for walk in found.values()]


def reference_layers(config, backbone, image):
    """The tokens after each layer, in storage order, with the closed form of the scan."""
    p = parameters(backbone)
    weight = p["patch_embed.projection.weight"].flatten(1)
    rows = patch_rows(image, config.patch_size, config.patch_size)
    tokens = rows @ weight.T + p["patch_embed.projection.bias"] + p["pos_embed"][0]
    grid = [size // patch for size, patch in zip(config.input_size, config.patch_size, strict=True)]
    for index in range(config.depth):
        layer = {name.removeprefix(f"layers.{index}."): tensor for name, tensor in p.items()}
        norm = reference.layer_norm(
            tokens, layer["norm.weight"], layer["norm.bias"], config.norm_epsilon
        )
        mixer = {name.removeprefix("mixer."): tensor for name, tensor in layer.items()}
        tokens = norm.clone()
        for walk in walks(config, index, grid):
            # Within a walk of its own, a token's index is its step.
            tokens[walk] += reference.mamba_mixer(mixer, norm[walk], list(range(len(walk))))
        if index in config.downsample:
            tokens, grid = merged(layer, tokens, grid)
        yield tokens, grid


def merged(p, tokens, grid):
    height, width = grid
    rows = []
    for i, j in itertools.product(range(0, height, 2), range(0, width, 2)):
        four = [tokens[(i + di) * width + j + dj] for di in (0, 1) for dj in (0, 1)]
        rows.append(torch.stack(four, 1).flatten())
    name = "down_sample_layer.norm"
    normed = reference.layer_norm(torch.stack(rows), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)
    return normed @ p["down_sample_layer.reduction.weight"].T, [height // 2, width // 2]


def reference_logits(model, image):
    config, p = model.config, parameters(model)
    *_, (tokens, _) = reference_layers(config, model.backbone, image)

    def norm(name, rows):
        weight, bias = p[f"backbone.{name}.weight"], p[f"backbone.{name}.bias"]
        return reference.layer_norm(rows, weight, bias, config.final_norm_epsilon)

    pooled = (norm("ln1", tokens) if config.final_norm else tokens).mean(0)
    pooled = norm("ln2", pooled) if config.pooled_norm else pooled
    head = "head.fc" if len(config.input_size) == 2 else "cls_head.fc_cls"
    return p[f"{head}.weight"] @ pooled + p[f"{head}.bias"]


@classifiers
def test_logits_equal_the_closed_form(config, generator):
    model = random_model(MambaND, config)
    images = torch.randn(2, 2, *config.input_size, generator=generator, dtype=torch.float64)
    expected = torch.stack([reference_logits(model, image) for image in images])
    assert_relative(model(images), expected)


def test_an_encoder_returns_the_maps_of_its_layers(generator):
    model = random_model(MambaNDEncoder, ENCODER)
    images = torch.randn(2, 2, 4, 9, 6, generator=generator, dtype=torch.float64)
    maps = model(images)
    assert len(maps) == 3
    for sample in range(2):
        layers = list(reference_layers(ENCODER, model, images[sample]))
        for index, found in zip((0, 3, 4), maps, strict=True):
            tokens, grid = layers[index]
            assert grid == [2, 3, 2]
            for t, h, w in itertools.product(range(2), range(3), range(2)):
                assert_relative(found[sample, :, t, h, w], tokens[(t * 3 + h) * 2 + w])


def test_an_encoder_of_images_returns_maps_of_the_grid_that_is_left(generator):
    encoder = dataclasses.replace(
        IMAGE, num_classes=0, final_norm=False, pooled_norm=False, out_indices=(0, 1, 3)
    )
    model = random_model(MambaNDEncoder, encoder)
    maps = model(torch.randn(1, 2, 8, 18, generator=generator, dtype=torch.float64))
    assert [tuple(found.shape) for found in maps] == [(1, 12, 4, 6), (1, 12, 2, 3), (1, 12, 2, 3)]


@pytest.mark.parametrize("index", range(13))
@pytest.mark.parametrize("factorization", Factorization)
def test_a_layer_of_a_volume_walks_in_the_documented_order(index, factorization):
    made = volume(factorization=factorization, depth=13)
    assert made.layer_order(index).tokens((2, 3, 2)).tolist() == walks(made, index, (2, 3, 2))
    assert made.layer_order(index) == made.layer_order(index + 6) != made.layer_order(index + 2)


@pytest.mark.parametrize("index", range(9))
def test_a_layer_of_an_image_walks_in_the_documented_order(index):
    order = MAMBA_2D_S.layer_order(index)
    assert order.tokens((3, 4)).tolist() == walks(MAMBA_2D_S, index, (3, 4))
    assert order == MAMBA_2D_S.layer_order(index + 4)
    others = {MAMBA_2D_S.layer_order(index + step) for step in range(4)}
    assert len(others) == 4


def test_the_grid_is_halved_after_the_merging_layer():
    assert [MAMBA_2D_S.layer_grid(index) for index in (0, 9, 10, 23)] == [
        (28, 28),
        (28, 28),
        (14, 14),
        (14, 14),
    ]


@classifiers
@pytest.mark.parametrize("index", range(6))
def test_ravel_undoes_unravel(config, index, generator):
    x = torch.randn(2, math.prod(config.grid), 5, generator=generator)
    order = config.layer_order(index)
    assert torch.equal(order.ravel(order.unravel(x, config.grid), config.grid), x)
    walked = order.unravel(x, config.grid)
    assert torch.equal(walked, x[:, order.tokens(config.grid)].flatten(0, 1))


def test_the_skip_carries_the_normalised_tokens(generator):
    block = random_model(lambda config: MambaNDBlock(config, 0), CLASSIFIERS["image-plain"])
    block.mixer.out_proj.weight.zero_()
    x = torch.randn(1, 9, 12, generator=generator, dtype=torch.float64)
    assert torch.equal(block(x), block.norm(x))


def test_merging_puts_the_four_values_of_a_channel_side_by_side():
    merging = PatchMerging(2).double().requires_grad_(False)
    merging.norm = torch.nn.Identity()
    merging.reduction = torch.nn.Identity()
    tokens = torch.arange(16.0, dtype=torch.float64).view(1, 8, 2)  # token t holds 2t, 2t + 1
    first, second = merging(tokens, (2, 4))[0].tolist()
    assert first == [0, 2, 8, 10, 1, 3, 9, 11]
    assert second == [4, 6, 12, 14, 5, 7, 13, 15]


@pytest.mark.parametrize(
    "config", [*CLASSIFIERS.values(), ENCODER, MAMBA_2D_B, MAMBA_3D_S, MAMBA_3D_S_ENCODER]
)
def test_a_configuration_survives_json(config):
    assert MambaNDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        ({"input_size": (8,)}, "input_size", r"two or three positive sizes, got \(8,\)"),
        ({"patch_size": (2, 3, 3)}, "patch_size", r"2 positive sizes, got \(2, 3, 3\)"),
        ({"patch_size": (3, 3)}, "patch_size", r"divisors of \(8, 18\), got \(3, 3\)"),
        ({"downsample": (4,)}, "downsample", r"increasing layers below 4, got \(4,\)"),
        ({"downsample": (2, 1)}, "downsample", r"increasing layers below 4, got \(2, 1\)"),
        ({"downsample": (1, 2)}, "downsample", r"a grid that can be halved, from \(4, 6\)"),
        ({"factorization": Factorization.HW_T}, "factorization", "'none' for images, got 'hw_t'"),
        ({"factorization": "hw_t"}, "factorization", "one of 'none', 'hw_t', 'h_w_t', got 'hw_t'"),
        ({"final_norm_epsilon": 0.0}, "final_norm_epsilon", "a positive number, got 0.0"),
        ({"num_classes": 0}, "num_classes", "at least 1, got 0"),
        ({"out_indices": (1,)}, "num_classes", "0 for an encoder, got 3"),
        ({"out_indices": (1,), "num_classes": 0}, "final_norm", "False for an encoder, got True"),
        ({"out_indices": (-1,)}, "out_indices", r"increasing layers below 4, got \(-1,\)"),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused_by_name(changes, name, expected):
    with pytest.raises(ValueError, match=rf"^MambaNDConfig\.{name}: expected {expected}"):
        dataclasses.replace(IMAGE, **changes)


def test_a_volume_has_no_merging():
    with pytest.raises(ValueError, match=r"downsample: expected no layers for volumes, got \(1,\)"):
        volume(downsample=(1,))


def test_a_classifier_is_no_encoder_and_the_other_way_round():
    with pytest.raises(ValueError, match="expected a configuration with num_classes"):
        MambaND(ENCODER)
    with pytest.raises(ValueError, match="expected out_indices"):
        MambaNDEncoder(IMAGE)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(batch, 2, 8, 18\), got \(1, 2, 8, 16\)"):
        MambaND(IMAGE)(torch.zeros(1, 2, 8, 16))
