"""Observers against numpy and against exact answers; both passes against direct computation."""

import dataclasses
from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambaquant_ext.calibrate import (
    BlockRun,
    LanguageRun,
    RangeObserver,
    collect_moments,
    collect_ranges,
    token_ids,
)
from mambaquant_ext.calibrate.observers import BINS
from mambaquant_ext.config import PRESETS, Granularity, Observer
from mambaquant_ext.model import language_model_forward, mixer_forward
from mambaquant_ext.model.parts import SCAN_BLOCK
from stages import models
from tolerances import MOMENT_ERROR, assert_equal, assert_relative

RTN = PRESETS["rtn"]
PERCENTILE = RTN.replace(observer=Observer.PERCENTILE, percentile=0.99)


def observer(kind, per_channel=False, percentile=0.999999, levels=255):
    return RangeObserver(kind, percentile, per_channel, levels)


def watched(kind, pieces, **options):
    watching = observer(kind, **options)
    for piece in pieces:
        watching.observe(piece)
    return watching.range()


def heavy_tailed(generator, rows=4000, channels=6):
    """Student's t with 3 degrees of freedom; channels of different size, shifted to either side."""
    normal = torch.randn(4, rows, channels, generator=generator)
    values = normal[0] / normal[1:].square().mean(0).sqrt()
    return (values + torch.tensor([0.0, 1, -1, 3, 0, 0])) * torch.tensor(
        [1.0, 10, 0.1, 1, 1e3, 1e-3]
    )


# Range observers


@pytest.mark.parametrize("kind", Observer)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_range_has_one_group_or_one_per_channel_and_holds_zero(kind, per_channel, generator):
    found = watched(kind, [heavy_tailed(generator) + 50], per_channel=per_channel)
    assert found.low.shape == found.high.shape == ((6,) if per_channel else (1,))
    assert found.low.dtype == found.high.dtype == torch.float32
    assert (found.low <= 0).all()
    assert (found.high > 0).all()


def test_absmax_is_exact(generator):
    x = heavy_tailed(generator).reshape(10, 400, 6)
    each = watched(Observer.ABSMAX, [x], per_channel=True)
    flat = x.reshape(-1, 6)
    assert_equal(each.low, flat.amin(0).clamp_max(0))
    assert_equal(each.high, flat.amax(0).clamp_min(0))
    assert_equal(each.amax, flat.abs().amax(0))
    whole = watched(Observer.ABSMAX, [x])
    assert (whole.low.item(), whole.high.item()) == (x.min().item(), x.max().item())


def signed_quantile(values, percentile):
    """numpy's: the smallest value of one sign that `percentile` of its values stay within."""
    magnitudes = np.abs(values.numpy())
    return np.quantile(magnitudes, percentile, method="inverted_cdf") if len(magnitudes) else 0.0


@pytest.mark.parametrize("percentile", [0.6, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("per_channel", [False, True])
def test_percentile_is_numpys_quantile_of_each_sign_within_a_bin(
    percentile, per_channel, generator
):
    x = heavy_tailed(generator)
    found = watched(Observer.PERCENTILE, [x], per_channel=per_channel, percentile=percentile)
    for group, column in enumerate(x.T if per_channel else [x.flatten()]):
        # The first tensor decides the width of a bin: its largest value and a ten-thousandth more.
        width = float(column.abs().max()) * 1.0001 / (BINS / 2)
        low = -signed_quantile(column[column < 0], percentile)
        high = signed_quantile(column[column >= 0], percentile)
        assert found.low[group] == pytest.approx(low, abs=1.01 * width)
        assert found.high[group] == pytest.approx(high, abs=1.01 * width)
        assert column.min() <= found.low[group] <= 0 <= found.high[group] <= column.max()


def test_percentile_clips_one_outlier_of_a_million_and_keeps_it_when_all_are_kept():
    x = torch.linspace(0, 1, 1_000_000)
    x[500_000] = 50.0
    assert watched(Observer.PERCENTILE, [x], percentile=0.99999).high.item() < 1.1
    assert watched(Observer.PERCENTILE, [x], percentile=1.0).high.item() == 50.0


@pytest.mark.parametrize("factor", [1.5, 10.0, 1e4, 1e12])
def test_growing_by_orders_of_magnitude_keeps_every_count(factor, generator):
    """After the growth, quantiles are those of all values, at the width that the largest of them asks for."""
    small = torch.randn(5000, 3, generator=generator)
    # Each channel grows by itself; the last one stays.
    factors = torch.tensor([factor, factor**0.5, 0.01])
    large = torch.randn(5000, 3, generator=generator) * factors
    watching = observer(Observer.PERCENTILE, per_channel=True, percentile=0.75)
    watching.observe(small)
    watching.observe(large)
    counts = watching._counts
    assert counts.dtype == torch.float64  # exact to 2^53
    assert torch.equal(counts.sum(1), torch.full((3,), 10_000.0, dtype=torch.float64))
    both = torch.cat([small, large])
    # Zero is an edge of the histogram and stays one: no value changes its sign by merging.
    assert torch.equal(counts[:, : BINS // 2].sum(1), (both < 0).sum(0).double())
    found = watching.range()
    for group in range(3):
        column = both[:, group]
        width = 2 * float(column.abs().max()) * 1.0001 / (BINS / 2)
        high = signed_quantile(column[column >= 0], 0.75)
        assert found.high[group] == pytest.approx(high, abs=1.01 * width)


def test_a_quantile_is_linear_inside_its_bin():
    """One large value makes the bin a thousandth of it wide: all others fall into the first."""
    x = torch.cat([torch.tensor([1000.0]), torch.linspace(0, 0.97, 100_000)])
    for percentile in (0.6, 0.75, 0.9):
        high = watched(Observer.PERCENTILE, [x], percentile=percentile).high.item()
        assert high == pytest.approx(percentile, abs=0.03)


def test_a_channel_that_is_dead_at_first_grows_from_zero(generator):
    x = torch.randn(1000, 2, generator=generator)
    zeros = torch.zeros(1000, 2)
    found = watched(Observer.PERCENTILE, [zeros, x], per_channel=True, percentile=1.0)
    assert_equal(found.low, x.amin(0))
    assert_equal(found.high, x.amax(0))
    dead = watched(Observer.PERCENTILE, [zeros], per_channel=True)
    assert_equal(dead.amax, torch.zeros(2))


def test_memory_is_the_histogram_whatever_is_observed(generator):
    watching = observer(Observer.PERCENTILE, per_channel=True)
    for power in range(12):
        watching.observe(torch.randn(100, 5, generator=generator) * 10.0**power)
    held = [value for value in vars(watching).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in held) == 5 * BINS + 3 * 5


def rounding_error(x, found, levels=255):
    """Mean squared error of the asymmetric grid of a range (algorithm section 1.6)."""
    step = (found.high - found.low) / levels
    return (torch.round(x.clamp(found.low, found.high) / step) * step - x).square().mean(0)


@pytest.mark.parametrize("levels", [15, 255])
def test_mse_beats_absmax_on_heavy_tails_and_keeps_a_uniform_range(levels, generator):
    x = heavy_tailed(
        generator, rows=100_000
    )  # a tail takes many values to cost an 8-bit grid anything
    options = {"per_channel": True, "levels": levels}
    clipped = watched(Observer.MSE, [x], **options)
    full = watched(Observer.ABSMAX, [x], **options)
    assert (rounding_error(x, clipped, levels) < 0.9 * rounding_error(x, full, levels)).sum() >= 4
    assert (rounding_error(x, clipped, levels) <= 1.01 * rounding_error(x, full, levels)).all()
    uniform = torch.rand(4000, 6, generator=generator) * 2 - 1
    kept, whole = (watched(k, [uniform], **options) for k in (Observer.MSE, Observer.ABSMAX))
    assert (kept.high / whole.high > 0.95).all()


@pytest.mark.parametrize("kind", Observer)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_stream_in_pieces_equals_the_whole(kind, per_channel, generator):
    """Equal bits where the first piece holds the largest value, because that fixes the bins."""
    x = heavy_tailed(generator)
    x[0] = 1.1 * x.abs().amax(0)
    whole = watched(kind, [x], per_channel=per_channel, percentile=0.99)
    pieces = watched(kind, x.split([1, 7, 992, 2999, 1]), per_channel=per_channel, percentile=0.99)
    assert_equal(pieces.low, whole.low)
    assert_equal(pieces.high, whole.high)


@pytest.mark.parametrize("kind", Observer)
def test_order_does_not_matter_once_the_bins_are_fixed(kind, generator):
    x = heavy_tailed(generator)
    x[0] = 1.1 * x.abs().amax(0)
    first, rest = x[:1], x[1:].split(500)
    forward = watched(kind, [first, *rest], per_channel=True, percentile=0.99)
    backward = watched(kind, [first, *reversed(rest)], per_channel=True, percentile=0.99)
    assert_equal(backward.low, forward.low)
    assert_equal(backward.high, forward.high)


def test_absmax_does_not_depend_on_order(generator):
    pieces = heavy_tailed(generator).split(500)
    forward = watched(Observer.ABSMAX, pieces, per_channel=True)
    backward = watched(Observer.ABSMAX, pieces[::-1], per_channel=True)
    assert_equal(backward.low, forward.low)
    assert_equal(backward.high, forward.high)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.sampled_from(Observer))
def test_no_range_reaches_beyond_the_values_and_zero(values, kind):
    x = torch.tensor(values)
    found = watched(kind, [x.reshape(-1, 1)])
    assert min(0.0, x.min().item()) <= found.low.item() <= 0
    assert 0 <= found.high.item() <= max(0.0, x.max().item())


@pytest.mark.parametrize("kind", Observer)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(kind, bad):
    x = torch.zeros(3, 4)
    x[1, 2] = bad
    for per_channel in (False, True):
        with pytest.raises(ValueError, match="expected finite activations, got inf or NaN"):
            observer(kind, per_channel).observe(x)


@pytest.mark.parametrize("kind", Observer)
def test_an_observer_that_saw_nothing_has_no_range(kind):
    with pytest.raises(ValueError, match="expected at least one observed value, got none"):
        observer(kind).range()
    with pytest.raises(ValueError, match="expected at least one observed value, got none"):
        watched(kind, [torch.zeros(0, 4)])


# Batches


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    "batch",
    [
        IDS,
        IDS.int(),
        IDS.to(torch.uint8),
        {"input_ids": IDS},
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        UserDict(input_ids=IDS),  # a BatchEncoding is one
    ],
    ids=["int64", "int32", "uint8", "dict", "mask", "BatchEncoding"],
)
def test_batches_of_every_kind_give_the_same_ids(batch):
    assert_equal(token_ids(batch), IDS)
    assert_equal(token_ids(IDS[0]), IDS[:1])


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (IDS.float(), TypeError, "expected integer token ids, got torch.float32"),
        (IDS.bool(), TypeError, "expected integer token ids, got torch.bool"),
        ({"input_ids": IDS.tolist()}, TypeError, "expected a tensor of token ids, got list"),
        (IDS.numpy(), TypeError, "expected a tensor of token ids, got ndarray"),
        ("text", TypeError, "expected a tensor of token ids, got str"),
        (IDS[None], ValueError, r"expected shape \(batch, seqlen\), got \(1, 2, 3\)"),
        (IDS[:, :0], ValueError, r"expected shape \(batch, seqlen\), got \(2, 0\)"),
        (torch.tensor(3), ValueError, r"expected shape \(batch, seqlen\), got \(\)"),
        ({"labels": IDS}, ValueError, "expected a mapping with input_ids, got labels"),
        (
            {"input_ids": IDS, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
            ValueError,
            r"expected no padding, got attention_mask with 1 zero\(s\)",
        ),
    ],
)
def test_a_bad_batch_is_named(batch, error, message):
    with pytest.raises(error, match=message):
        token_ids(batch)
    for collect in (collect_moments, lambda model, found: collect_ranges(model, found, RTN)):
        with pytest.raises(error, match=message):
            collect(small_run(models.REAL), [batch])


@pytest.mark.parametrize("bad", [-1, 37])
def test_ids_outside_the_vocabulary_are_refused(bad):
    ids = torch.tensor([[0, 36, bad]])
    message = r"expected token ids from 0 to 36, got "
    with pytest.raises(ValueError, match=message):
        collect_moments(small_run(models.REAL), [ids])
    with pytest.raises(ValueError, match=message):
        collect_ranges(small_run(models.REAL), [ids], RTN)


def test_no_batches_are_refused():
    layer = small(models.REAL).layers[0]
    message = "expected at least one batch of tokens, got none"
    with pytest.raises(ValueError, match=message):
        collect_moments(small_run(models.REAL), [])
    with pytest.raises(ValueError, match=message):
        collect_ranges(small_run(models.REAL), [], RTN)
    with pytest.raises(ValueError, match=message):
        collect_moments(BlockRun(layer), [])
    with pytest.raises(ValueError, match=message):
        collect_ranges(BlockRun(layer), [], RTN)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_refused_by_both_passes(bad):
    model = small(models.REAL)
    embedding = model.embedding.clone()
    embedding[5, 3] = bad
    broken = model.replace(embedding=embedding)
    ids = [torch.tensor([[4, 5, 6]])]
    with pytest.raises(ValueError, match="expected finite activations, got inf or NaN"):
        collect_moments(LanguageRun(broken), ids)
    with pytest.raises(ValueError, match="expected finite activations, got inf or NaN"):
        collect_ranges(LanguageRun(broken), ids, RTN)
    with pytest.raises(ValueError, match="expected finite activations, got inf or NaN"):
        collect_moments(BlockRun(model.layers[0]), [torch.full((1, 3, 48), bad)])
    with pytest.raises(ValueError, match="expected finite activations, got inf or NaN"):
        collect_ranges(BlockRun(model.layers[0]), [torch.full((1, 3, 48), bad)], RTN)


# The two passes


def small(sizes):
    return models.model(sizes).to(torch.float32)


def small_run(sizes):
    return LanguageRun(small(sizes))


def activations(sizes):
    """Site to (tokens, channels) of each layer, in float64, without the collecting code."""
    model = models.model(sizes)
    caught = [{} for _ in model.layers]

    def tap_of(index):
        def tap(site, value):
            caught[index].setdefault(site, []).append(value.flatten(0, -2))
            return value

        return tap

    for ids in models.batches(sizes):
        language_model_forward(model, ids, tap_of)
    return [{site: torch.cat(values).numpy() for site, values in layer.items()} for layer in caught]


geometries = pytest.mark.parametrize("sizes", models.GEOMETRIES, ids=lambda sizes: sizes.name)


def named_moments(layer):
    """Name to tensor of a LayerMoments of one branch."""
    (branch,) = layer.branches
    found = {name: getattr(layer, name) for name in ("in_amax", "out_amax")}
    found |= {field.name: getattr(branch, field.name) for field in dataclasses.fields(branch)}
    assert found.pop("samples") > 0
    return found


def assert_moment(actual, expected):
    error = np.abs(actual.double().numpy() - expected).max()
    assert error <= MOMENT_ERROR * np.abs(expected).max(), f"off by {error:.3g}"


@geometries
def test_moments_are_those_of_the_activations(sizes):
    stats = collect_moments(small_run(sizes), models.batches(sizes))
    assert stats.samples == sum(ids.numel() for ids in models.batches(sizes))
    assert stats.in_moment.dtype == torch.float64
    layers = activations(sizes)
    inputs = [layer["in"] for layer in layers]
    assert_moment(stats.in_moment, np.mean([x.T @ x / len(x) for x in inputs], axis=0))
    for found, seen in zip(stats.layers, layers, strict=True):
        assert_moment(found.in_amax, np.abs(seen["in"]).max(0))
        assert_moment(found.out_amax, np.abs(seen["out"]).max(0))
        (branch,) = found.branches
        assert_moment(branch.h_amax, np.abs(seen["h.0"]).max(0))
        assert_moment(branch.C_amax, np.abs(seen["C.0"]).max(0))
        dt = seen["dt.0"]
        assert_moment(branch.dt_min, dt.min(0))
        assert_moment(branch.dt_max, dt.max(0))
        assert_moment(branch.dt_mean, dt.mean(0))
        assert_moment(branch.dt_moment, dt.T @ dt / len(dt))
        assert branch.samples == stats.samples


@geometries
@pytest.mark.parametrize("granularity", Granularity)
def test_ranges_are_those_of_the_activations_in_the_granularity_of_the_recipe(sizes, granularity):
    recipe = RTN.replace(granularity=granularity)
    stats = collect_ranges(small_run(sizes), models.batches(sizes), recipe)
    free = granularity is Granularity.PER_CHANNEL
    for found, seen in zip(stats.layers, activations(sizes), strict=True):
        assert set(found) == {"in", "xs", "z", "x.0", "dt.0", "B.0", "C.0", "h.0", "out"}
        for site, per_channel in {
            "in": False, "xs": free, "z": free, "x.0": free, "dt.0": False, "B.0": free,
            "C.0": False, "out": False,
        }.items():  # fmt: skip
            values = seen[site] if per_channel else seen[site].reshape(-1, 1)
            assert_moment(found[site].low, np.minimum(values.min(0), 0))
            assert_moment(found[site].high, np.maximum(values.max(0), 0))
        # The state's scale belongs to its channel, whatever the state index.
        states = np.abs(seen["h.0"].reshape(-1, sizes.dim, sizes.dstate)).max((0, 2))
        assert_moment(found["h.0"].amax, states if free else states.max(keepdims=True))


@pytest.mark.parametrize("recipe", [RTN, PERCENTILE], ids=["absmax", "percentile"])
def test_no_statistic_depends_on_how_sequences_are_batched(recipe):
    """One row at a time or all at once: extremes to a rounding of the forward pass, sums to float32's."""
    sizes = models.REAL
    together = [torch.cat(models.batches(sizes))]
    apart = [row[None] for row in together[0]]
    a, b = (collect_moments(small_run(sizes), batches) for batches in (together, apart))
    assert a.samples == b.samples
    assert_moment(a.in_moment, b.in_moment.numpy())
    for one, other in zip(a.layers, b.layers, strict=True):
        assert named_moments(one).keys() == named_moments(other).keys()
        for name, value in named_moments(one).items():
            assert_moment(value, named_moments(other)[name].double().numpy())
    if recipe is PERCENTILE:
        return  # bins depend on the first batch
    ranges = [collect_ranges(small_run(sizes), batches, recipe) for batches in (together, apart)]
    for one, other in zip(*(found.layers for found in ranges), strict=True):
        for site in one:
            assert_moment(one[site].low, other[site].low.double().numpy())
            assert_moment(one[site].high, other[site].high.double().numpy())
    assert_moment(ranges[0].head.high, ranges[1].head.high.double().numpy())


def test_batches_are_read_once_one_at_a_time_with_progress_after_each():
    events = []

    def stream():
        for index, ids in enumerate(models.batches(models.REAL)):
            events.append(("read", index))
            yield ids

    collect_moments(
        small_run(models.REAL), stream(), lambda done: events.append(("done", done - 1))
    )
    count = len(models.batches(models.REAL))
    assert events == [(what, index) for index in range(count) for what in ("read", "done")]
    events.clear()
    collect_ranges(
        small_run(models.REAL), stream(), RTN, lambda done: events.append(("done", done - 1))
    )
    assert events == [(what, index) for index in range(count) for what in ("read", "done")]


def test_states_are_seen_in_blocks_of_bounded_length():
    """Memory is batch * SCAN_BLOCK * dim * dstate however long the sequence."""
    lengths = []

    def tap(site, value):
        if site == "h.0":
            lengths.append(value.shape[0])
        return value

    layer = small(models.REAL).layers[0]
    mixer_forward(layer, torch.randn(1, 3 * SCAN_BLOCK + 5, 48), tap=tap)
    assert lengths == [SCAN_BLOCK] * 3 + [5]


@pytest.mark.parametrize("recipe", [RTN, PERCENTILE, RTN.replace(observer=Observer.MSE)], ids=str)
def test_two_runs_give_equal_bits(recipe):
    sizes = models.REAL
    first, second = (collect_moments(small_run(sizes), models.batches(sizes)) for _ in range(2))
    assert_equal(first.in_moment, second.in_moment)
    for one, other in zip(first.layers, second.layers, strict=True):
        for name, value in named_moments(one).items():
            assert_equal(value, named_moments(other)[name])
    first, second = (
        collect_ranges(small_run(sizes), models.batches(sizes), recipe) for _ in range(2)
    )
    for one, other in zip(first.layers, second.layers, strict=True):
        for site in one:
            assert_equal(one[site].low, other[site].low)
            assert_equal(one[site].high, other[site].high)


def test_a_block_alone_gives_what_it_gives_inside_the_model():
    sizes, recipe = models.REAL, PERCENTILE
    model = small(sizes)
    inputs = [model.embedding[ids] for ids in models.batches(sizes)]
    alone = collect_moments(BlockRun(model.layers[0]), inputs)
    expected = collect_moments(LanguageRun(model), models.batches(sizes))
    assert alone.samples == expected.samples
    for name, value in named_moments(alone.layers[0]).items():
        assert_equal(value, named_moments(expected.layers[0])[name])
    ranges = collect_ranges(BlockRun(model.layers[0]), inputs, recipe)
    assert ranges.head is None
    (found,) = ranges.layers
    inside = collect_ranges(LanguageRun(model), models.batches(sizes), recipe).layers[0]
    assert found.keys() == inside.keys()
    for site, wanted in inside.items():
        assert_equal(found[site].low, wanted.low)
        assert_equal(found[site].high, wanted.high)


def test_statistics_do_not_change_the_model():
    model = small(models.REAL)
    before, _ = mixer_forward(model.layers[0], model.embedding[models.prompt(models.REAL)])
    collect_moments(LanguageRun(model), models.batches(models.REAL))
    collect_ranges(LanguageRun(model), models.batches(models.REAL), PERCENTILE)
    after, _ = mixer_forward(model.layers[0], model.embedding[models.prompt(models.REAL)])
    assert_relative(after, before)


def test_every_part_of_a_block_has_sites_of_its_own(generator):
    """Two branches behind two convolutions: statistics of one are not those of the other; the class token's range
    is that of its own row of out_proj's input."""
    layer = models.many_parts(generator)
    x = torch.randn(2, 9, 16, generator=generator)
    caught = {}

    def tap(site, value):
        caught.setdefault(site, []).append(value.flatten(0, -2))
        return value

    mixer_forward(layer, x, tap=tap)
    seen = {site: torch.cat(values) for site, values in caught.items()}
    parts = ("x", "dt", "B", "C", "h")
    ends = {"in", "xs", "z", "out", "out.class"}
    ranges = collect_ranges(BlockRun(layer), [x], RTN).layers[0]
    assert ranges.keys() == seen.keys() == ends | {f"{part}.{i}" for part in parts for i in (0, 1)}
    for site in ranges.keys() - {"h.0", "h.1"}:
        assert_equal(ranges[site].low, seen[site].min().clamp_max(0)[None])
        assert_equal(ranges[site].high, seen[site].max().clamp_min(0)[None])
    assert len(seen["out.class"]) == 2
    assert len(seen["out"]) == 2 * 8
    moments = collect_moments(BlockRun(layer), [x]).layers[0]
    for index, branch in enumerate(moments.branches):
        assert branch.samples == 18
        assert_equal(branch.dt_max, seen[f"dt.{index}"].amax(0))
        assert_equal(branch.h_amax, seen[f"h.{index}"].abs().amax(0))
        assert_equal(branch.C_amax, seen[f"C.{index}"].abs().amax(0))
