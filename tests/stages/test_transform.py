"""Every transform leaves the model's function unchanged (algorithm section 3), and does what it is for (section 4)."""

import dataclasses
from functools import reduce
from pathlib import Path

import pytest
import torch

from mambaquant_ext import ops
from mambaquant_ext.calibrate import BlockRun, LanguageRun, collect_moments
from mambaquant_ext.config import PRESETS, Rotation
from mambaquant_ext.model import (
    BranchWeights,
    ConvWeights,
    Merge,
    MixerState,
    MixerWeights,
    NormWeights,
    block_forward,
    language_model_forward,
    mixer_forward,
)
from mambaquant_ext.model.checkpoint import load_float_model
from mambaquant_ext.model.hf import language_model_weights
from mambaquant_ext.pipeline import LanguageSource, folded
from mambaquant_ext.transform import (
    StreamRotation,
    center_dt,
    fold_final_norm,
    fold_norm,
    klt_rotation,
    needs_folded_norms,
    pad_dt,
    rotate,
    rotate_dt,
    rotate_in,
    rotate_out,
    rotate_residual_ends,
    rotate_residual_layer,
    rotate_state,
    smooth_dt,
    smooth_gate,
    smooth_in,
    smooth_state,
    smoothing_scale,
    transform,
    transform_layer,
)
from reference import hadamard as reference_hadamard
from stages import models
from stages.models import on_branch
from tolerances import EQUAL_MEAN_SQUARES, assert_orthogonal, assert_relative

geometries = pytest.mark.parametrize("sizes", models.GEOMETRIES, ids=lambda sizes: sizes.name)
TRAINED = Path(__file__).parents[1] / "data" / "mamba-lm-docs"
MAMBAQUANT = PRESETS["w8a8"]
UNTRANSFORMED = PRESETS["rtn"]
SWITCHES = {
    "residual_rotation": Rotation.KLT,
    "out_rotation": True,
    "state_rotation": True,
    "dt_rotation": Rotation.KLT,
    "smooth_gate": True,
    "smooth_state": True,
    "smooth_dt": True,
    "center_dt": True,
    "smooth_in": True,
}


def random_rotation(n, generator):
    """Orthogonal, not symmetric, unlike any Hadamard matrix."""
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


def transformed(sizes, recipe, dtype=torch.float64):
    """The model after transform(), calibrated on `models.batches`; folding in float64 when dtype is."""
    model = models.model(sizes)
    if dtype == torch.float32:
        model = model.to(dtype)
        model = model.replace(layers=folded(model.layers, recipe))
    elif needs_folded_norms(recipe):
        model = model.replace(layers=tuple(fold_norm(layer) for layer in model.layers))
    return transform(model, moments_of(model, models.batches(sizes)), recipe, dtype)


def moments_of(model, batches):
    return collect_moments(LanguageRun(model.to(torch.float32)), batches)


def assert_same_function(model, sizes, dtype=torch.float64):
    expected, _ = models.reference_outputs(sizes)
    assert_relative(language_model_forward(model, models.prompt(sizes))[0], expected, dtype)


# One transform of a block each, with scales and rotations drawn at random: the identity holds for any.
LAYER_TRANSFORMS = {
    "P1 smooth_gate": lambda m, g: smooth_gate(m, models.spread(g, m.dim)),
    "P2 smooth_state": lambda m, g: on_branch(smooth_state)(m, models.spread(g, dstate(m))),
    "P3 rotate_state": lambda m, g: rotate_state(m),
    "P4 smooth_dt": lambda m, g: on_branch(smooth_dt)(m, models.spread(g, dt_rank(m))),
    "P4 center_dt": lambda m, g: on_branch(center_dt)(m, models.spread(g, dt_rank(m))),
    "P4 rotate_dt": lambda m, g: on_branch(rotate_dt)(m, random_rotation(dt_rank(m), g)),
    "P7 smooth_in": lambda m, g: smooth_in(m, models.spread(g, m.hidden)),
    "P8 rotate_out": lambda m, g: rotate_out(m),
    "2.3.1 fold_norm": lambda m, g: fold_norm(m),
    "7.3 rotate_in": lambda m, g: rotate_in(fold_norm(m)),
    "pad_dt": lambda m, g: on_branch(pad_dt)(m, dt_rank(m) + 3),
}


def dstate(layer):
    return layer.branches[0].dstate


def dt_rank(layer):
    return layer.branches[0].dt_rank


def tensors(layer):
    """Name to tensor of every tensor of a block, at any depth."""
    found = {}

    def add(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, tuple):
            for index, part in enumerate(value):
                add(f"{name}.{index}", part)
        elif isinstance(value, (NormWeights, ConvWeights, BranchWeights, MixerWeights)):
            for field in dataclasses.fields(value):
                add(f"{name}.{field.name}", getattr(value, field.name))

    add("", layer)
    return found


@geometries
@pytest.mark.parametrize("name", LAYER_TRANSFORMS)
def test_a_transform_alone_keeps_the_logits(name, sizes, generator):
    model = models.model(sizes)
    layers = tuple(LAYER_TRANSFORMS[name](layer, generator) for layer in model.layers)
    for new, old in zip(layers, model.layers, strict=True):
        assert weights_differ(new, old), "the transform did nothing"
    assert_same_function(model.replace(layers=layers), sizes)


def weights_differ(a, b):
    """Whether two blocks differ in any tensor."""
    pairs = zip(tensors(a).items(), tensors(b).items(), strict=True)
    return any(name != same or not torch.equal(x, y) for (name, x), (same, y) in pairs)


@geometries
def test_all_transforms_together_keep_the_logits_and_agree_with_the_reference(sizes, generator):
    """P1 to P9 in the order of section 7.1, every value random; run by our forward and by the reference."""
    model = models.model(sizes)
    rotation = random_rotation(sizes.hidden, generator)

    def one(layer):
        layer = all_of(layer, ("P4 center_dt", "P1 smooth_gate", "P2 smooth_state", "P4 smooth_dt"))
        layer = rotate_residual_layer(fold_norm(layer), rotation)
        return all_of(layer, ("P7 smooth_in", "P8 rotate_out", "P3 rotate_state", "P4 rotate_dt"))

    def all_of(layer, names):
        return reduce(lambda block, name: LAYER_TRANSFORMS[name](block, generator), names, layer)

    ends = rotate_residual_ends(fold_final_norm(model), rotation)
    result = ends.replace(layers=tuple(one(layer) for layer in model.layers))
    assert_same_function(result, sizes)
    expected, _ = models.reference_outputs(sizes)
    assert_relative(models.reference_logits(result, models.prompt(sizes)[0].tolist())[0], expected)


@geometries
def test_p1_smooth_gate_divides_out_projs_input_exactly_per_channel(sizes, generator):
    layer = models.model(sizes).layers[0]
    scale = models.spread(generator, sizes.dim)
    tokens = torch.randn(9, sizes.hidden, generator=generator, dtype=torch.float64)
    _, v, _ = models.reference_mixer(layer, tokens)
    smoothed, _ = seen(smooth_gate(layer, scale), tokens, "out")
    for channel in range(sizes.dim):
        assert_relative(smoothed[:, channel], v[:, channel] / scale[channel])


def seen(layer, tokens, site, initial_state=None):
    """The tensor at a site, and the output, for one sequence."""
    caught = []

    def tap(name, value):
        if name in (site, f"{site}.0"):
            caught.append(value)
        return value

    state = None
    if initial_state is not None:
        width = layer.convs[0].weight.shape[1]
        history = torch.zeros(1, width - 1, layer.dim, dtype=torch.float64)
        state = MixerState(conv=history, ssm=initial_state[None])
    out, _ = mixer_forward(layer, tokens[None], state, tap)
    values = [value[:, 0] if site == "h" else value[0] for value in caught]
    return torch.cat(values), out[0]


@geometries
def test_p2_the_smoothed_state_is_the_state_over_s_at_every_token(sizes, generator):
    layer = models.model(sizes).layers[0]
    scale = models.spread(generator, sizes.dstate)
    tokens = torch.randn(9, sizes.hidden, generator=generator, dtype=torch.float64)
    initial = torch.randn(sizes.dim, sizes.dstate, generator=generator, dtype=torch.float64)
    smoothed = on_branch(smooth_state)(layer, scale)
    for start in (torch.zeros_like(initial), initial):
        expected, _, states = models.reference_mixer(layer, tokens, start)
        h, out = seen(smoothed, tokens, "h", start / scale)
        assert_relative(out, expected)
        for n in range(sizes.dstate):
            assert_relative(h[..., n], states[..., n] / scale[n])


def test_p2_an_initial_state_that_is_not_scaled_changes_the_output(generator):
    layer = models.model(models.REAL).layers[0]
    tokens = torch.randn(9, 48, generator=generator, dtype=torch.float64)
    initial = torch.randn(96, 16, generator=generator, dtype=torch.float64)
    smoothed = on_branch(smooth_state)(layer, models.spread(generator, 16))
    expected, _, _ = models.reference_mixer(layer, tokens, initial)
    _, out = seen(smoothed, tokens, "h", initial)
    with pytest.raises(AssertionError, match="error above"):
        assert_relative(out, expected)


@geometries
def test_p3_the_read_out_sees_rotated_states_and_rotated_c(sizes, generator):
    layer = models.model(sizes).layers[0]
    tokens = torch.randn(9, sizes.hidden, generator=generator, dtype=torch.float64)
    rotated = rotate_state(layer)
    H = reference_hadamard.matrix(sizes.dstate)
    for site in ("h", "C"):
        assert_relative(seen(rotated, tokens, site)[0], seen(layer, tokens, site)[0] @ H)


def test_p3_a_scale_per_channel_of_the_state_is_smoothing_along_channels(generator):
    """S3: y = s_e sum_n (h / s_e) C, which the read-out's scale per channel does at no cost."""
    layer = models.model(models.REAL).layers[0]
    tokens = torch.randn(1, 9, 48, generator=generator, dtype=torch.float64)
    scale = models.spread(generator, 96)[:, None]

    def through_scales(site, value):
        return (value / scale) * scale if site == "h.0" else value

    assert_relative(
        mixer_forward(layer, tokens, tap=through_scales)[0], mixer_forward(layer, tokens)[0]
    )


@geometries
def test_p4_dt_is_centred_smoothed_and_rotated_as_a_row_vector(sizes, generator):
    layer = models.model(sizes).layers[0]
    tokens = torch.randn(9, sizes.hidden, generator=generator, dtype=torch.float64)
    center, scale = models.spread(generator, sizes.dt_rank), models.spread(generator, sizes.dt_rank)
    rotation = random_rotation(sizes.dt_rank, generator)
    result = on_branch(
        lambda branch: rotate_dt(smooth_dt(center_dt(branch, center), scale), rotation)
    )(layer)
    dt, out = seen(result, tokens, "dt")
    expected_dt, expected = seen(layer, tokens, "dt")
    assert_relative(dt, ((expected_dt - center) / scale) @ rotation)
    assert_relative(out, expected)


@geometries
def test_p5_smoothing_the_conv_is_unchanged_from_the_first_token_on(sizes, generator):
    """S7, which a scale per channel of the conv's input makes unnecessary."""
    layer = models.model(sizes).layers[0]
    scale = models.spread(generator, sizes.dim)
    smoothed = layer.replace(
        in_x=layer.in_x / scale[:, None],
        in_x_bias=layer.in_x_bias / scale,
        convs=(layer.convs[0].replace(weight=layer.convs[0].weight * scale[:, None]),),
    )
    tokens = torch.randn(9, sizes.hidden, generator=generator, dtype=torch.float64)
    expected, _, _ = models.reference_mixer(layer, tokens)
    _, out = seen(smoothed, tokens, "xs")
    assert_relative(out[:3], expected[:3])
    assert_relative(out, expected)


@geometries
def test_p6_the_residual_is_rotated_at_every_layer(sizes, generator):
    model = models.model(sizes)
    rotation = random_rotation(sizes.hidden, generator)
    layers = tuple(rotate_residual_layer(fold_norm(layer), rotation) for layer in model.layers)
    result = rotate_residual_ends(fold_final_norm(model), rotation).replace(layers=layers)
    assert_same_function(result, sizes)
    _, expected = models.reference_outputs(sizes)
    residual = result.embedding[models.prompt(sizes)]
    assert_relative(residual[0], expected[0] @ rotation)
    for layer, original in zip(result.layers, expected[1:], strict=True):
        residual = residual + mixer_forward(layer, residual)[0]
        assert_relative(residual[0], original @ rotation)


@geometries
def test_p7_smoothing_the_norm_after_rotating_the_residual_keeps_the_output(sizes, generator):
    rotation = random_rotation(sizes.hidden, generator)
    layer = rotate_residual_layer(fold_norm(models.model(sizes).layers[0]), rotation)
    scale = models.spread(generator, sizes.hidden)
    tokens = torch.randn(9, sizes.hidden, generator=generator, dtype=torch.float64)
    expected_normed, expected = seen(layer, tokens, "in")
    normed, out = seen(smooth_in(layer, scale), tokens, "in")
    assert_relative(out, expected)
    assert_relative(normed, expected_normed / scale)


@geometries
def test_p8_rotate_out_folds_the_matrix_of_the_hadamard_kernel(sizes, generator):
    layer = models.model(sizes).layers[0].to(torch.float32)
    rotated = rotate_out(layer)
    v = torch.randn(5, sizes.dim, generator=generator)
    assert_relative(ops.hadamard_transform(v) @ rotated.out.T, v @ layer.out.T, torch.float32)


@pytest.mark.parametrize("n", [12, 16, 20, 24, 28, 36, 44, 48, 52, 60, 96, 768, 1536])
def test_p14_p15_the_folded_matrix_is_orthogonal_with_entries_of_one_size(n):
    H = ops.hadamard_matrix(n)
    assert_orthogonal(H)
    assert_orthogonal(H.T)
    assert_orthogonal(H.to(torch.float16))
    signs = (H * n**0.5).round()
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert torch.equal(signs @ signs.T, n * torch.eye(n, dtype=torch.float64))


def gaussian(generator, n=20_000, m=48):
    """Rows of the experiment of section 4.3: a dense random mixing whose rows differ in size."""
    mixing = torch.randn(m, m, generator=generator, dtype=torch.float64)
    mixing = mixing * models.spread(generator, m)[:, None]
    return torch.randn(n, m, generator=generator, dtype=torch.float64) @ mixing


def variance_ratio(x):
    """Largest over smallest channel variance."""
    variance = x.var(0)
    return float(variance.max() / variance.min())


def mean_square_ratio(x):
    square = x.square().mean(0)
    return float(square.max() / square.min())


def klt(x):
    return klt_rotation(x.T @ x / len(x), len(x))


def test_p14_the_klt_rotation_is_orthogonal(generator):
    rotation = klt(gaussian(generator))
    assert rotation.dtype == torch.float64
    assert_orthogonal(rotation)


def test_p16_klt_then_hadamard_gives_every_channel_the_mean_variance(generator):
    """Equations 9 and 13, and the order of the figures of section 4.3: none, H, K, K H, (K H)^T."""
    X = gaussian(generator)
    X = X - X.mean(0)
    H, KH = ops.hadamard_matrix(48), klt(X)
    K = KH @ H.T
    eigenvalues = (K.T @ (X.T @ X) @ K).diagonal()
    assert_relative(
        (X @ H).var(0), ((K.T @ H).square() * eigenvalues[:, None]).sum(0) / (len(X) - 1)
    )
    assert_relative((X @ KH).var(0), (X.var(0).mean()).expand(48))
    assert variance_ratio(X) > 3
    assert variance_ratio(X @ H) > 3
    assert variance_ratio(X @ K) > 1e3
    assert variance_ratio(X @ KH.T) > 3


def test_p16_a_mean_counts_because_the_moment_is_not_centred(generator):
    """The symmetric quantizer sees mean squares; these are equal even where means are large."""
    X = gaussian(generator) + 3 * torch.randn(48, generator=generator, dtype=torch.float64)
    assert mean_square_ratio(X @ klt(X)) == pytest.approx(1, abs=EQUAL_MEAN_SQUARES)
    assert mean_square_ratio(X @ klt(X - X.mean(0))) > 1 + 100 * EQUAL_MEAN_SQUARES


def test_p16_the_rotation_of_one_half_equalises_the_other(generator):
    """Section 4.3's bound, on random data."""
    X = gaussian(generator)
    first, second = X[::2], X[1::2]
    assert variance_ratio(second) > 3
    assert variance_ratio(second @ klt(first)) < 1.5


@geometries
def test_p16_r1_of_one_half_of_the_tokens_equalises_the_other(sizes):
    """The same on the model's own normalised inputs, averaged over its layers as R1 is."""
    model = models.model(sizes)
    model = model.replace(layers=tuple(fold_norm(layer) for layer in model.layers))
    batches = models.batches(sizes, count=40)
    first, second = (moments_of(model, half) for half in (batches[::2], batches[1::2]))
    R = klt_rotation(first.in_moment, first.samples * sizes.layers)
    unrotated = second.in_moment.diagonal()
    rotated = (R.T @ second.in_moment @ R).diagonal()
    assert float(unrotated.max() / unrotated.min()) > 3
    assert float(rotated.max() / rotated.min()) < 1.5


def test_p16_the_rotations_of_one_half_of_a_trained_models_tokens_equalise_the_other():
    """Reviewers' question about the paper: is K stable across batches. 3072 tokens against another 3072."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    tokenizer = tokenizers.Tokenizer.from_file(str(TRAINED / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode((TRAINED / "calib.txt").read_text("utf-8")[:100_000]).ids)
    windows = [ids[start : start + 256][None] for start in range(0, 24 * 256, 256)]
    assert ids.numel() >= 24 * 256
    model = LanguageSource(language_model_weights(load_float_model(TRAINED)))
    run = model.folded_run(MAMBAQUANT)
    first, second = (collect_moments(run, half) for half in (windows[::2], windows[1::2]))
    pairs = [(first.in_moment, second.in_moment)]
    for one, other in zip(first.layers, second.layers, strict=True):
        pairs.append((one.branches[0].dt_moment, other.branches[0].dt_moment))
    for own, other in pairs:
        R = klt_rotation(own, first.samples)
        before, after = other.diagonal(), (R.T @ other @ R).diagonal()
        assert float(before.max() / before.min()) > 5
        assert float(after.max() / after.min()) < 1.5


@geometries
def test_r5_equalises_dt_and_its_transpose_does_not(sizes):
    """Section 2.3.7: dt Q with Q = K H; the reference's (K H)^T keeps the function and the spread."""
    model = models.model(sizes)
    prepared = transformed(sizes, UNTRANSFORMED.replace(center_dt=True, smooth_dt=True))
    stats = moments_of(model, models.batches(sizes))
    rotated = transformed(
        sizes,
        UNTRANSFORMED.replace(center_dt=True, smooth_dt=True, dt_rotation=Rotation.KLT),
    )
    measured = moments_of(rotated, models.batches(sizes))
    moments = moments_of(prepared, models.batches(sizes))
    for layer, rotated_layer in zip(moments.layers, measured.layers, strict=True):
        (branch,), (rotated_branch,) = layer.branches, rotated_layer.branches
        before, after = branch.dt_moment.diagonal(), rotated_branch.dt_moment.diagonal()
        Q = klt_rotation(branch.dt_moment, stats.samples)
        transposed = (Q @ branch.dt_moment @ Q.T).diagonal()
        assert float(before.max() / before.min()) > 1.2
        assert float(after.max() / after.min()) == pytest.approx(1, abs=EQUAL_MEAN_SQUARES)
        assert float(transposed.max() / transposed.min()) > 1.2


@geometries
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_the_derived_moment_of_dt_is_the_measured_one(sizes, center, smooth):
    """transform rotates by the eigenvectors of the moment that centring and S5 leave behind. Undoing the
    Hadamard half of R5 shows them: the moment measured on the transformed model is diagonal there."""
    recipe = UNTRANSFORMED.replace(center_dt=center, smooth_dt=smooth, dt_rotation=Rotation.KLT)
    result = transformed(sizes, recipe)
    H = ops.hadamard_matrix(sizes.dt_rank)
    for layer in moments_of(result, models.batches(sizes)).layers:
        diagonal = H @ layer.branches[0].dt_moment @ H.T
        off = diagonal - diagonal.diagonal().diag()
        assert float(off.abs().max() / diagonal.abs().max()) < EQUAL_MEAN_SQUARES


@geometries
def test_smoothing_and_centring_reach_the_ranges_that_they_promise(sizes):
    """dt centred; max |activation| over max |weight| is one ratio: s = sqrt(a / w) leaves sqrt(a w) on both."""
    recipe = UNTRANSFORMED.replace(
        center_dt=True, smooth_dt=True, smooth_gate=True, smooth_state=True
    )
    result = transformed(sizes, recipe)
    stats = moments_of(result, models.batches(sizes))
    for layer, moments in zip(result.layers, stats.layers, strict=True):
        (branch,), (seen_branch,) = layer.branches, moments.branches
        amax = torch.maximum(seen_branch.dt_min.abs(), seen_branch.dt_max.abs())
        assert_relative(seen_branch.dt_max, -seen_branch.dt_min, torch.float32)
        assert_relative(amax, branch.dt.abs().amax(0), torch.float32)
        assert_relative(moments.out_amax, layer.out.abs().amax(0), torch.float32)
        assert_relative(seen_branch.h_amax, seen_branch.C_amax, torch.float32)


@geometries
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_keeps_the_logits(name, dtype, sizes):
    assert_same_function(transformed(sizes, PRESETS[name], dtype).to(dtype), sizes, dtype)


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_alone_keeps_the_logits_and_changes_the_model(switch):
    result = transformed(models.REAL, UNTRANSFORMED.replace(**{switch: SWITCHES[switch]}))
    assert_same_function(result, models.REAL)
    assert differs(result, transformed(models.REAL, UNTRANSFORMED))


@pytest.mark.parametrize("switch", [name for name in SWITCHES if name != "smooth_in"])
def test_every_switch_can_be_turned_off_alone(switch):
    off = Rotation.NONE if isinstance(SWITCHES[switch], Rotation) else False
    result = transformed(models.REAL, MAMBAQUANT.replace(**{switch: off}))
    assert_same_function(result, models.REAL)
    assert differs(result, transformed(models.REAL, MAMBAQUANT))


def differs(a, b):
    """Whether two models differ in any weight of a block or in any mark."""
    marks = ("has_in_rotation", "has_out_rotation", "has_state_rotation")
    return any(
        weights_differ(one, other) or any(getattr(one, m) != getattr(other, m) for m in marks)
        for one, other in zip(a.layers, b.layers, strict=True)
    )


@pytest.mark.parametrize("merge", list(Merge))
@pytest.mark.parametrize("switch", ["all", *SWITCHES])
def test_a_block_of_many_parts_keeps_its_function(switch, merge, generator):
    """Two branches, whatever merges them, a norm, an excitation, a normalised skip, a class token; R1 online."""
    layer = models.many_parts(generator, merge).to(torch.float64)
    x = torch.randn(4, 25, 16, generator=generator, dtype=torch.float64)
    recipe = MAMBAQUANT
    if switch != "all":
        recipe = UNTRANSFORMED.replace(**{switch: SWITCHES[switch]})
    folded_layer = fold_norm(layer) if needs_folded_norms(recipe) else layer
    moments = collect_moments(BlockRun(folded_layer.to(torch.float32)), [x])
    is_local = recipe.residual_rotation is not Rotation.NONE
    result = transform_layer(
        folded_layer, moments.layers[0], recipe, StreamRotation(is_local=is_local)
    )
    assert weights_differ(result, layer)
    assert result.has_in_rotation == is_local
    assert_relative(block_forward(result, x)[0], block_forward(layer, x)[0])


@pytest.mark.parametrize("merge", list(Merge))
def test_a_block_of_many_parts_takes_and_gives_a_rotated_stream(merge, generator):
    layer = models.many_parts(generator, merge).to(torch.float64)
    x = torch.randn(4, 9, 16, generator=generator, dtype=torch.float64)
    rotation = random_rotation(16, generator)
    result = rotate_residual_layer(fold_norm(layer), rotation)
    assert_relative(block_forward(result, x @ rotation)[0], block_forward(layer, x)[0] @ rotation)


def test_prefill_and_decode_equal_one_prefill_after_all_transforms():
    """P13: the carried state lives in the scaled basis and needs nothing else."""
    layer = transformed(models.REAL, MAMBAQUANT).layers[0]
    x = torch.randn(1, 12, 48, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    whole, _ = mixer_forward(layer, x)
    out, state = mixer_forward(layer, x[:, :5])
    pieces = [out]
    for t in range(5, 12):
        out, state = mixer_forward(layer, x[:, t : t + 1], state)
        pieces.append(out)
    assert_relative(torch.cat(pieces, 1), whole)


def test_transform_leaves_its_input_alone():
    model = models.model(models.REAL).to(torch.float32)
    before = tensors(model.layers[0])
    copies = {name: tensor.clone() for name, tensor in before.items()}
    stats = moments_of(model, models.batches(models.REAL))
    recipe = MAMBAQUANT.replace(residual_rotation=Rotation.NONE)
    assert transform(model, stats, recipe) is not model
    assert {*before} > {".norm.weight", ".convs.0.weight", ".branches.0.A", ".out"}
    for name, copy in copies.items():
        assert torch.equal(tensors(model.layers[0])[name], copy), name
    assert not model.layers[0].has_out_rotation


def test_transforms_in_the_wrong_order_are_refused():
    layer = models.model(models.REAL).layers[0]
    with pytest.raises(ValueError, match=r"rotate_state: expected a block that is not rotated yet"):
        rotate_state(rotate_state(layer))
    with pytest.raises(ValueError, match=r"rotate_out: expected a block that is not rotated yet"):
        rotate_out(rotate_out(layer))
    with pytest.raises(ValueError, match=r"rotate_in: expected a block that is not rotated yet"):
        rotate_in(rotate_in(fold_norm(layer)))
    with pytest.raises(ValueError, match=r"rotate_in: expected a block with a folded norm"):
        rotate_in(layer)
    with pytest.raises(ValueError, match=r"fold_norm: expected a block that is not rotated behind"):
        fold_norm(rotate_in(fold_norm(layer)))
    with pytest.raises(
        ValueError, match=r"smooth_in: expected a block with a norm and no rotation"
    ):
        smooth_in(rotate_in(fold_norm(layer)), torch.ones(48, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"rotate_residual_layer: expected a block with a folded norm"
    ):
        rotate_residual_layer(layer, torch.eye(48, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"smooth_gate: expected a block whose out_proj is not"):
        smooth_gate(rotate_out(layer), torch.ones(96, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"rotate_residual_ends: expected a model with a folded"):
        rotate_residual_ends(models.model(models.REAL), torch.eye(48, dtype=torch.float64))


def test_a_block_whose_state_is_rotated_is_not_smoothed():
    """S4 divides states one by one: behind a rotation they are no longer what the scales were made for."""
    model = models.model(models.REAL)
    moments = moments_of(model, models.batches(models.REAL)).layers[0]
    layer = rotate_state(model.layers[0])
    recipe = UNTRANSFORMED.replace(smooth_state=True)
    with pytest.raises(ValueError, match=r"smooth_state: expected a block whose state axis is not"):
        transform_layer(layer, moments, recipe)
    transform_layer(layer, moments, UNTRANSFORMED)


def test_a_model_whose_norms_are_not_folded_is_refused():
    model = models.model(models.REAL)
    stats = moments_of(model, models.batches(models.REAL))
    with pytest.raises(ValueError, match="expected a block with a folded norm"):
        transform(model, stats, MAMBAQUANT)


def test_a_klt_of_too_few_tokens_is_refused():
    moment = torch.eye(48, dtype=torch.float64)
    klt_rotation(moment, 192)
    with pytest.raises(
        ValueError, match=r"expected at least 192 calibration samples for 48 .* got 191"
    ):
        klt_rotation(moment, 191)


def test_r5_counts_the_tokens_and_r1_the_tokens_of_every_layer():
    sizes = models.REAL
    model = models.model(sizes)
    model = model.replace(layers=tuple(fold_norm(layer) for layer in model.layers))
    for recipe, enough in (
        (UNTRANSFORMED.replace(dt_rotation=Rotation.KLT), 4 * sizes.dt_rank),
        (UNTRANSFORMED.replace(residual_rotation=Rotation.KLT), 4 * sizes.hidden // sizes.layers),
    ):
        for count in (enough, enough - 1):
            ids = torch.arange(count)[None] % sizes.vocab
            stats = moments_of(model, [ids])
            if count == enough:
                transform(model, stats, recipe)
                continue
            with pytest.raises(ValueError, match="klt_rotation: expected at least"):
                transform(model, stats, recipe)


@pytest.mark.parametrize(
    ("switch", "value", "sizes", "nearest"),
    [
        ("residual_rotation", Rotation.HADAMARD, models.Geometry("", hidden=50), "48.*52"),
        ("residual_rotation", Rotation.KLT, models.Geometry("", hidden=50), "48.*52"),
        ("out_rotation", True, models.Geometry("", dim=68), "64.*72"),
        ("state_rotation", True, models.Geometry("", dstate=10), "8.*12"),
    ],
)
def test_a_width_without_a_matrix_names_the_nearest(switch, value, sizes, nearest):
    with pytest.raises(ValueError, match=nearest):
        transformed(sizes, UNTRANSFORMED.replace(**{switch: value}))


@pytest.mark.parametrize("kind", [Rotation.HADAMARD, Rotation.KLT])
@pytest.mark.parametrize(("dt_rank", "widened"), [(3, 4), (6, 8), (11, 12), (12, 12)])
def test_r5_widens_a_dt_without_a_matrix_by_zeros(kind, dt_rank, widened):
    """The least rank that has one; every channel of the widened dt has the same mean square all the same."""
    sizes = models.Geometry("", dt_rank=dt_rank)
    result = transformed(sizes, UNTRANSFORMED.replace(dt_rotation=kind))
    assert_same_function(result, sizes)
    moments = moments_of(result, models.batches(sizes))
    for layer, seen_layer in zip(result.layers, moments.layers, strict=True):
        (branch,), (seen_branch,) = layer.branches, seen_layer.branches
        assert branch.dt_rank == widened
        assert branch.x_dt.shape == (widened, sizes.dim)
        assert branch.x_dt_bias.shape == (widened,)
        square = seen_branch.dt_moment.diagonal()
        is_level = float(square.max() / square.min()) - 1 < EQUAL_MEAN_SQUARES
        assert is_level == (kind is Rotation.KLT)


def test_a_dt_rank_beyond_every_matrix_names_the_nearest(monkeypatch):
    monkeypatch.setattr(rotate, "supported_hadamard_sizes", lambda: (1, 2, 4, 8))
    recipe = UNTRANSFORMED.replace(dt_rotation=Rotation.HADAMARD)
    with pytest.raises(ValueError, match=r"8.*12"):
        transformed(models.Geometry("", dt_rank=11), recipe)


def test_smoothing_scales_are_clamped_and_dead_channels_have_one():
    activation = torch.tensor([4.0, 0.0, 1e9, 1e-9, 0.0, 1.0], dtype=torch.float64)
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    expected = torch.tensor([2.0, 0.01, 100.0, 0.01, 0.01, 100.0], dtype=torch.float64)
    assert torch.equal(smoothing_scale(activation, weight), expected)


def test_a_dead_channel_survives_every_transform():
    """No value of an all-zero gate, out column or dt row becomes infinite or NaN."""
    sizes = models.REAL
    model = models.model(sizes)
    layers = []
    for layer in model.layers:
        (branch,) = layer.branches
        in_z, out, x_dt, bias = (
            t.clone() for t in (layer.in_z, layer.out, branch.x_dt, branch.x_dt_bias)
        )
        in_z[3], out[:, 5], x_dt[2], bias[2] = 0, 0, 0, 0
        bias_z = layer.in_z_bias.clone()
        bias_z[3] = 0
        dead_branch = branch.replace(x_dt=x_dt, x_dt_bias=bias)
        layers.append(layer.replace(in_z=in_z, in_z_bias=bias_z, out=out, branches=(dead_branch,)))
    dead = model.replace(layers=tuple(fold_norm(layer) for layer in layers))
    stats = moments_of(dead, models.batches(sizes))
    result = transform(dead, stats, MAMBAQUANT, torch.float64)
    ids = models.prompt(sizes)
    assert_relative(language_model_forward(result, ids), language_model_forward(dead, ids))
