"""Vim in float: the names of the public checkpoints, and the block of algorithm section 1.3."""

import json

import pytest
import torch

from mambaquant_ext.model.vision import BimambaType, FinalPool, VimConfig, VisionMamba
from mambaquant_ext.model.vision.vim import VimBlock, VimMixer
from mambaquant_ext.model.vision.vim_config import (
    VIM_BASE,
    VIM_BASE_PLUS,
    VIM_SMALL,
    VIM_SMALL_PLUS,
    VIM_TINY,
    VIM_TINY_PLUS,
)
from reference import vision as reference
from reference.mamba import rms
from stages.vision.float_models import (
    mixer_shapes,
    parameters,
    patch_rows,
    prefixed,
    random_model,
    shapes_on_meta,
)
from tolerances import assert_relative

PUBLISHED = {
    "tiny": (VIM_TINY, 192, 196),
    "small": (VIM_SMALL, 384, 196),
    "base": (VIM_BASE, 768, 196),
    "tiny-plus": (VIM_TINY_PLUS, 192, 729),
    "small-plus": (VIM_SMALL_PLUS, 384, 729),
    "base-plus": (VIM_BASE_PLUS, 768, 729),
}
SECOND_SETS = {
    BimambaType.NONE: (),
    BimambaType.V1: ("A_log",),
    BimambaType.V2: ("A_log", "D", "conv1d", "x_proj", "dt_proj"),
}
# Every field of the public code's configuration that this project's checkpoints write down.
CONFIG_JSON = {
    "architecture": "VisionMamba (Vim, hustvl/Vim)",
    "img_size": 28,
    "channels": 1,
    "patch_size": 4,
    "stride": 4,
    "num_patches": 49,
    "embed_dim": 192,
    "depth": 6,
    "num_classes": 2,
    "d_state": 16,
    "d_conv": 4,
    "expand": 2,
    "d_inner": 384,
    "dt_rank": 12,
    "bimamba_type": "v2",
    "if_devide_out": True,
    "if_cls_token": True,
    "use_middle_cls_token": True,
    "cls_token_position": 24,
    "if_abs_pos_embed": True,
    "if_rope": False,
    "if_rope_residual": False,
    "rms_norm": True,
    "norm_epsilon": 1e-05,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "final_pool_type": "mean",
    "drop_path_rate": 0.0,
    "in_proj_bias": False,
    "out_proj_bias": False,
    "conv_bias": True,
    "dt_proj_bias": True,
    "mean": [0.286],
    "std": [0.353],
    "dtype": "float32",
    "class_names": ["shirt", "bag"],
}


def small(**changes):
    """Three by three patches that overlap, of a two-channel image."""
    values = {
        "img_size": 8,
        "patch_size": 4,
        "stride": 2,
        "channels": 2,
        "embed_dim": 20,
        "depth": 2,
        "num_classes": 3,
        "d_state": 4,
        "d_conv": 3,
        "mean": (0.4, 0.5),
        "std": (0.2, 0.3),
    }
    return VimConfig(**{**values, **changes})


VARIANTS = {
    "v2-mean-middle": small(),
    "v2-sum-head": small(if_devide_out=False, use_middle_cls_token=False),
    "v2-layernorm": small(rms_norm=False, norm_epsilon=1e-3),
    "v1": small(bimamba_type=BimambaType.V1),
    "none-no-class-token": small(bimamba_type=BimambaType.NONE, if_cls_token=False),
    "last-token-no-positions": small(
        if_cls_token=False, if_abs_pos_embed=False, final_pool_type=FinalPool.NONE
    ),
    "all-biases": small(in_proj_bias=True, out_proj_bias=True, dt_rank=5, expand=1),
    "no-conv-bias": small(conv_bias=False),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def official_shapes(config, hidden, patches):
    tokens = patches + config.if_cls_token
    norm = {"weight": (hidden,)} if config.rms_norm else {"weight": (hidden,), "bias": (hidden,)}
    biases = (
        *(("in_proj",) if config.in_proj_bias else ()),
        *(("out_proj",) if config.out_proj_bias else ()),
        *(("conv1d",) if config.conv_bias else ()),
    )
    mixer = mixer_shapes(
        hidden,
        config.expand * hidden,
        config.d_state,
        None if config.dt_rank == "auto" else config.dt_rank,
        config.d_conv,
        backward=SECOND_SETS[config.bimamba_type],
        biases=biases,
    )
    shapes = {
        "patch_embed.proj.weight": (hidden, config.channels, config.patch_size, config.patch_size),
        "patch_embed.proj.bias": (hidden,),
        "head.weight": (config.num_classes, hidden),
        "head.bias": (config.num_classes,),
        **prefixed("norm_f", norm),
    }
    if config.if_cls_token:
        shapes["cls_token"] = (1, 1, hidden)
    if config.if_abs_pos_embed:
        shapes["pos_embed"] = (1, tokens, hidden)
    for index in range(config.depth):
        shapes |= prefixed(f"layers.{index}.norm", norm)
        shapes |= prefixed(f"layers.{index}.mixer", mixer)
    return shapes


@pytest.mark.parametrize(("config", "hidden", "patches"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_a_published_model_has_the_official_names_and_shapes(config, hidden, patches):
    shapes, _ = shapes_on_meta(VisionMamba, config)
    assert (config.depth, config.num_classes, config.d_state, config.channels) == (24, 1000, 16, 3)
    assert shapes == official_shapes(config, hidden, patches)


@variants
def test_a_variant_has_the_official_names_and_shapes(config):
    assert shapes_on_meta(VisionMamba, config)[0] == official_shapes(config, 20, 9)


@pytest.mark.parametrize(("config", "millions"), [(VIM_TINY, 7), (VIM_SMALL, 26), (VIM_BASE, 98)])
def test_a_published_model_has_the_published_number_of_parameters(config, millions):
    assert round(shapes_on_meta(VisionMamba, config)[1] / 1e6) == millions


def reference_logits(model, image):
    """One image, in storage order, with the closed form of the scan."""
    config, p = model.config, parameters(model)
    patch, stride = (config.patch_size,) * 2, (config.stride,) * 2
    weight = p["patch_embed.proj.weight"].flatten(1)
    tokens = patch_rows(image, patch, stride) @ weight.T + p["patch_embed.proj.bias"]
    position = None
    if config.if_cls_token:
        position = 4 if config.use_middle_cls_token else 0
        tokens = torch.cat([tokens[:position], p["cls_token"][0], tokens[position:]])
    if config.if_abs_pos_embed:
        tokens = tokens + p["pos_embed"][0]

    def norm(name, rows):
        weight, eps = p[f"{name}.weight"], config.norm_epsilon
        if config.rms_norm:
            return torch.stack([rms(row, weight, eps) for row in rows])
        return reference.layer_norm(rows, weight, p[f"{name}.bias"], eps)

    for index, layer in enumerate(model.layers):
        rows = norm(f"layers.{index}.norm", tokens)
        kind, mean = config.bimamba_type.value, config.if_devide_out
        tokens = tokens + reference.vim_mixer(parameters(layer.mixer), rows, kind, mean)
    rows = norm("norm_f", tokens)
    if position is not None:
        pooled = rows[position]
    else:
        pooled = rows.mean(0) if config.final_pool_type is FinalPool.MEAN else rows[-1]
    return p["head.weight"] @ pooled + p["head.bias"]


@variants
def test_logits_equal_the_closed_form(config, generator):
    model = random_model(VisionMamba, config)
    images = torch.randn(2, 2, 8, 8, generator=generator, dtype=torch.float64)
    expected = torch.stack([reference_logits(model, image) for image in images])
    assert_relative(model(images), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_in_the_dtype_of_its_weights(dtype, generator):
    model = VisionMamba(small()).to(dtype)
    images = torch.randn(2, 2, 8, 8, generator=generator).to(dtype)
    assert model(images).dtype == dtype


def test_swapping_the_two_sets_and_the_order_of_the_tokens_turns_the_output_around(generator):
    mixer = random_model(lambda config: VimMixer(config.mixer_sizes, BimambaType.V2, True), small())
    swapped = random_model(
        lambda config: VimMixer(config.mixer_sizes, BimambaType.V2, True), small(), seed=2
    )
    second = {"A_log": "A_b_log", "D": "D_b"} | {
        name: name.replace(".", "_b.")
        for name in parameters(mixer)
        if name.startswith(("conv1d.", "x_proj.", "dt_proj."))
    }
    exchange = second | {there: here for here, there in second.items()}
    swapped.load_state_dict(
        {exchange.get(name, name): value for name, value in mixer.state_dict().items()}
    )
    tokens = torch.randn(2, 7, 20, generator=generator, dtype=torch.float64)
    assert_relative(swapped(tokens.flip(1)).flip(1), mixer(tokens))
    assert (mixer(tokens.flip(1)).flip(1) - mixer(tokens)).abs().max() > 0.01


def test_a_block_adds_before_it_norms(generator):
    block = random_model(VimBlock, small())
    hidden, residual = torch.randn(2, 1, 5, 20, generator=generator, dtype=torch.float64)
    out, stream = block(hidden, residual)
    first_out, first_stream = block(hidden + residual)
    assert torch.equal(stream, hidden + residual)
    assert torch.equal(first_stream, hidden + residual)
    assert torch.equal(out, first_out)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected images \(batch, 2, 8, 8\), got \(1, 2, 8, 9\)"):
        VisionMamba(small())(torch.zeros(1, 2, 8, 9))


def test_normalize_scales_bytes_and_refuses_everything_else():
    config = small()
    images = torch.tensor([[0, 51], [102, 255]], dtype=torch.uint8).view(2, 2, 1, 1)
    expected = torch.tensor([[-2.0, -1.0], [0.0, 5 / 3]]).view(2, 2, 1, 1)
    torch.testing.assert_close(config.normalize(images), expected)
    for wrong in (images.float(), images[:, :1]):
        with pytest.raises(
            ValueError, match=r"normalize: expected images \(batch, 2, ...\), uint8"
        ):
            config.normalize(wrong)


@pytest.mark.parametrize("config", [*VARIANTS.values(), VIM_TINY, VIM_BASE_PLUS])
def test_a_configuration_survives_json(config):
    assert VimConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_json_is_read_in_full():
    config = VimConfig.from_dict(CONFIG_JSON)
    read = {**config.to_dict(), "num_patches": config.num_patches, "d_inner": config.d_inner}
    read["cls_token_position"] = config.cls_token_position
    assert CONFIG_JSON["architecture"].startswith(read.pop("architecture"))
    assert {name: CONFIG_JSON[name] for name in read} == read
    auto = VimConfig.from_dict({**CONFIG_JSON, "dt_rank": "auto"})
    assert auto.mixer_sizes == config.mixer_sizes


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("if_rope", True, "expected False, the only value supported, got True"),
        ("dt_proj_bias", False, "expected True, the only value supported, got False"),
        ("use_double_cls_token", True, "expected False, the only value supported, got True"),
        ("bimamba_type", "v3", r"expected one of 'none', 'v1', 'v2', got 'v3'"),
        ("final_pool_type", "max", r"expected one of 'none', 'mean', got 'max'"),
        ("num_patches", 50, "expected 49, as the other fields say, got 50"),
        ("cls_token_position", 0, "expected 24, as the other fields say, got 0"),
        ("colour", "red", "unknown field"),
        ("depth", 6.0, "expected int, got 6.0"),
        ("depth", True, "expected int, got True"),
        ("depth", 0, "expected at least 1, got 0"),
        ("dt_rank", "half", r"expected .*'auto'.*, got 'half'"),
        ("dt_rank", 0, "expected at least 1, got 0"),
        ("rms_norm", 1, "expected bool, got 1"),
        ("norm_epsilon", 0.0, "expected a positive number, got 0.0"),
        ("patch_size", 29, "expected at most img_size = 28, got 29"),
        ("mean", [0.1, 0.2], r"expected 1 values, one a channel, got \(0.1, 0.2\)"),
        ("std", [0.0], r"expected positive values, got \(0.0,\)"),
        ("std", ["a"], r"expected tuple.*, got \('a',\)"),
        ("class_names", ["shirt"], r"expected 2 names or none, got \('shirt',\)"),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError, match=rf"^VimConfig\.{name}: {expected}"):
        VimConfig.from_dict({**CONFIG_JSON, name: value})


def test_a_missing_field_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^VimConfig\.depth: missing"):
        VimConfig.from_dict({"embed_dim": 192, "num_classes": 10})
