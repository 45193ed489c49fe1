"""The float forward pass against the reference, and its states."""

import pytest
import torch
from torch.nn import functional as F

from mambaquant_ext.model import MixerState, language_model_forward, mixer_forward
from mambaquant_ext.model.hf import language_model_weights
from stages import models
from tolerances import assert_relative

geometries = pytest.mark.parametrize("sizes", models.GEOMETRIES, ids=lambda sizes: sizes.name)


@geometries
def test_logits_equal_the_reference(sizes):
    expected, _ = models.reference_outputs(sizes)
    assert_relative(language_model_forward(models.model(sizes), models.prompt(sizes))[0], expected)


@geometries
def test_every_hook_of_a_transform_means_what_the_reference_says(sizes):
    """gate_scale and the three online rotations, with random values instead of equivalent ones."""
    generator = torch.Generator().manual_seed(4)
    layer = (
        models.model(sizes)
        .layers[0]
        .replace(
            gate_scale=models.spread(generator, sizes.dim),
            has_in_rotation=True,
            has_out_rotation=True,
            has_state_rotation=True,
        )
    )
    tokens = torch.randn(9, sizes.hidden, generator=generator, dtype=torch.float64)
    initial = torch.randn(sizes.dim, sizes.dstate, generator=generator, dtype=torch.float64)
    history = torch.zeros(1, sizes.width - 1, sizes.dim, dtype=torch.float64)
    state = MixerState(conv=history, ssm=initial[None])
    out, final = mixer_forward(layer, tokens[None], state)
    expected, _, states = models.reference_mixer(layer, tokens, initial)
    assert_relative(out[0], expected)
    assert_relative(final.ssm[0], states[-1])


@geometries
@pytest.mark.parametrize("split", [0, 1, 2, 31, 32, 33, 69, 70])
def test_a_split_sequence_with_carried_state_equals_the_whole(sizes, split):
    """Splits around the conv's width, the scan's block and both ends."""
    layer = models.model(sizes).layers[0]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 70, sizes.hidden, generator=generator, dtype=torch.float64)
    whole, state = mixer_forward(layer, x)
    first, carried = mixer_forward(layer, x[:, :split])
    second, final = mixer_forward(layer, x[:, split:], carried)
    assert_relative(torch.cat([first, second], 1), whole)
    assert_relative(final.ssm, state.ssm)
    assert_relative(final.conv, state.conv)


def test_a_later_token_changes_no_earlier_output():
    layer = models.model(models.REAL).layers[0]
    x = torch.randn(1, 40, 48, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    changed = x.clone()
    changed[:, 25] += 1
    before, after = mixer_forward(layer, x)[0], mixer_forward(layer, changed)[0]
    assert torch.equal(before[:, :25], after[:, :25])
    assert (before[:, 25:] != after[:, 25:]).any(-1).all()


def test_left_padding_leaves_the_other_tokens_alone():
    layer = models.model(models.REAL).layers[0]
    x = torch.randn(1, 12, 48, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    padded = torch.cat([torch.full((1, 5, 48), 3.0, dtype=torch.float64), x], 1)
    mask = torch.arange(17)[None] >= 5
    out, state = mixer_forward(layer, padded, mask=mask)
    expected, expected_state = mixer_forward(layer, x)
    assert_relative(out[:, 5:], expected)
    assert_relative(state.ssm, expected_state.ssm)


def test_the_parts_reproduce_in_proj_and_x_proj_of_transformers():
    """P12, and the whole model in float32 against MambaForCausalLM."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(8)
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=48, state_size=16, num_hidden_layers=2, time_step_rank=12
    )
    model = transformers.MambaForCausalLM(config).eval()
    weights = language_model_weights(model)
    for block, layer in zip(model.backbone.layers, weights.layers, strict=True):
        mixer = block.mixer
        assert torch.equal(torch.cat([layer.in_x, layer.in_z]), mixer.in_proj.weight)
        (branch,) = layer.branches
        assert torch.equal(torch.cat([branch.x_dt, branch.x_B, branch.x_C]), mixer.x_proj.weight)
        x = torch.randn(3, 96)
        parts = [F.linear(x, part) for part in (branch.x_dt, branch.x_B, branch.x_C)]
        for part, whole in zip(
            parts, mixer.x_proj(x).detach().split([12, 16, 16], -1), strict=True
        ):
            assert_relative(part, whole, torch.float32)
    ids = torch.randint(50, (2, 20))
    with torch.no_grad():
        assert_relative(language_model_forward(weights, ids), model(ids).logits, torch.float32)
