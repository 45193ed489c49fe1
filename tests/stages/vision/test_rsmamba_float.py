"""RSMamba in float: the names of the public checkpoints, the paths of a layer and the gate that merges them."""

import dataclasses
import json

import pytest
import torch

from mambaquant_ext.model.vision import PathType, RSMamba, RSMambaConfig
from mambaquant_ext.model.vision.rsmamba import (
    RSMAMBA_B,
    RSMAMBA_H,
    RSMAMBA_L,
    RSMambaBackbone,
    merged,
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

PUBLISHED = {"B": (RSMAMBA_B, 192, 24), "L": (RSMAMBA_L, 256, 36), "H": (RSMAMBA_H, 320, 48)}
# Walks over the tokens, and whether a gate merges them, by the public code's word for both.
PATHS = {
    "forward": (1, False),
    "forward_reverse_mean": (2, False),
    "forward_reverse_gate": (2, True),
    "forward_reverse_shuffle_mean": (3, False),
    "forward_reverse_shuffle_gate": (3, True),
}
# Patches of four pixels, three apart: four along each axis, the last of which reaches three pixels beyond the image.
SMALL = RSMambaConfig(
    img_size=10,
    patch_size=4,
    stride=3,
    channels=2,
    embed_dim=12,
    depth=2,
    num_classes=3,
    d_state=4,
    d_conv=3,
    norm_epsilon=1e-3,
    shuffle_seed=7,
    mean=(0.4, 0.5),
    std=(0.2, 0.3),
)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def official_shapes(config, hidden, tokens, paths, gated):
    norm = {"weight": (hidden,), "bias": (hidden,)}
    patch = config.patch_size
    shapes = {
        "patch_embed.projection.weight": (hidden, config.channels, patch, patch),
        "pos_embed": (1, tokens, hidden),
        **prefixed("pre_norm", norm),
        **prefixed("ln2", norm),
    }
    if config.final_norm:
        shapes |= prefixed("ln1", norm)
    for index in range(config.depth):
        mixer = mixer_shapes(hidden, 2 * hidden, config.d_state, width=config.d_conv)
        shapes |= prefixed(f"layers.{index}", mixer)
        if gated:
            shapes[f"gate_layers.{index}.0.weight"] = (paths, paths * hidden)
    head = {"weight": (config.num_classes, hidden), "bias": (config.num_classes,)}
    return prefixed("backbone", shapes) | prefixed("head.fc", head)


@pytest.mark.parametrize(("config", "hidden", "depth"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_a_published_model_has_the_official_names_and_shapes(config, hidden, depth):
    shapes, _ = shapes_on_meta(RSMamba, config)
    assert (config.depth, config.num_classes, config.d_state) == (depth, 21, 16)
    assert shapes == official_shapes(config, hidden, 28 * 28, 3, True)


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("word", PATHS)
def test_a_variant_has_the_official_names_and_shapes(word, final_norm):
    config = small(path_type=PathType(word), final_norm=final_norm)
    expected = official_shapes(config, 12, 16, *PATHS[word])
    assert shapes_on_meta(RSMamba, config)[0] == expected


@pytest.mark.parametrize(
    ("config", "millions"), [(RSMAMBA_B, 6.4), (RSMAMBA_L, 16.2), (RSMAMBA_H, 33.1)]
)
def test_a_published_model_has_the_published_number_of_parameters(config, millions):
    assert round(shapes_on_meta(RSMamba, config)[1] / 1e6, 1) == millions


def reference_logits(model, image):
    """One image, in storage order, with the closed form of the scan."""
    config, p = model.config, parameters(model.backbone)
    padded = torch.zeros(2, 13, 13, dtype=torch.float64)
    padded[:, :10, :10] = image
    weight = p["patch_embed.projection.weight"].flatten(1)
    tokens = patch_rows(padded, (4, 4), (3, 3)) @ weight.T + p["pos_embed"][0]

    def norm(name, rows):
        return reference.layer_norm(
            rows, p[f"{name}.weight"], p[f"{name}.bias"], config.norm_epsilon
        )

    paths, gated = PATHS[config.path_type.value]
    for index, layer in enumerate(model.backbone.layers):
        rows = norm("pre_norm", tokens)
        there = list(range(16))
        walks = [there, there[::-1], config.permutation(index).tolist()][:paths]
        outs = [reference.mamba_mixer(parameters(layer), rows, walk) for walk in walks]
        weights = torch.full((paths,), 1 / paths, dtype=torch.float64)
        if gated:
            means = torch.cat([out.mean(0) for out in outs])
            scores = torch.exp(p[f"gate_layers.{index}.0.weight"] @ means)
            weights = scores / scores.sum()
        for weight, out in zip(weights, outs, strict=True):
            tokens = tokens + weight * out
    pooled = norm("ln2", (norm("ln1", tokens) if config.final_norm else tokens).mean(0))
    return model.head.fc.weight @ pooled + model.head.fc.bias


@pytest.mark.parametrize("word", PATHS)
def test_logits_equal_the_closed_form(word, generator):
    final_norm = word != "forward"
    model = random_model(RSMamba, small(path_type=PathType(word), final_norm=final_norm))
    images = torch.randn(2, 2, 10, 10, generator=generator, dtype=torch.float64)
    expected = torch.stack([reference_logits(model, image) for image in images])
    assert_relative(model(images), expected)


@pytest.mark.parametrize("word", [word for word, (_, gated) in PATHS.items() if gated])
def test_the_weights_of_the_paths_sum_to_one(word, generator):
    backbone = random_model(RSMambaBackbone, small(path_type=PathType(word)))
    same = torch.randn(2, 16, 12, generator=generator, dtype=torch.float64)
    paths = PATHS[word][0]
    assert_relative(merged((same,) * paths, backbone.gate_layers[0]), same)
    different = torch.randn(paths, 2, 16, 12, generator=generator, dtype=torch.float64)
    weighted = merged(tuple(different), backbone.gate_layers[0])
    assert (weighted - different.mean(0)).abs().max() > 0.01


def test_a_layer_without_memory_gives_the_same_along_every_path(generator):
    """With one tap and A far below zero a token's result depends on nothing before it."""
    backbone = random_model(RSMambaBackbone, small(d_conv=1))
    for layer in backbone.layers:
        layer.A_log.fill_(30.0)
    x = torch.randn(2, 16, 12, generator=generator, dtype=torch.float64)
    forward, reverse, shuffled = backbone.layers[1].walk(x)
    assert_relative(reverse, forward)
    assert_relative(shuffled, forward)


def test_every_layer_has_a_permutation_of_its_own_that_the_seed_decides():
    permutations = [RSMAMBA_B.permutation(index) for index in range(3)]
    for permutation in permutations:
        assert torch.equal(permutation.sort().values, torch.arange(784))
    assert not torch.equal(permutations[0], permutations[1])
    assert not torch.equal(permutations[1], permutations[2])
    assert torch.equal(permutations[1], RSMAMBA_B.permutation(1))
    reseeded = dataclasses.replace(RSMAMBA_B, shuffle_seed=100)
    assert not torch.equal(permutations[0], reseeded.permutation(0))


def test_the_global_generator_has_no_say(generator):
    model = random_model(RSMamba, SMALL)
    images = torch.randn(1, 2, 10, 10, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    first, state = model(images), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(model(images), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", [SMALL, small(path_type=PathType.FORWARD), RSMAMBA_H])
def test_a_configuration_survives_json(config):
    assert RSMambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("path_type", "backward", "expected one of 'forward', .*, got 'backward'"),
        ("shuffle_seed", -1, "expected at least 0, got -1"),
        ("num_classes", 0, "expected at least 1, got 0"),
        ("stride", 0, "expected at least 1, got 0"),
        ("cls_position", "head", "unknown field"),
        ("pe_type", "sine", "unknown field"),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError, match=rf"^RSMambaConfig\.{name}: {expected}"):
        RSMambaConfig.from_dict({**SMALL.to_dict(), name: value})


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(batch, 2, 10, 10\), got \(1, 2, 13, 13\)"):
        RSMamba(SMALL)(torch.zeros(1, 2, 13, 13))
