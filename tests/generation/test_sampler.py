"""The native sampler against the processors in float64, and exactly against its own weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mambaquant_ext
from mambaquant_ext import GenerationOptions
from mambaquant_ext.generation import Sampler
from reference import sampling as reference
from tolerances import PROBABILITY_ERROR, WEIGHT_ROUNDING, assert_equal

INF = float("inf")
# One below, at and above the vectors and groups of each instruction set, and a real vocabulary.
SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 511, 513, 1023, 1025, 3000, 50280)


def sampler(batch, vocab, **options):
    return Sampler(batch, vocab, GenerationOptions(**options))


def drawn(sampler_, logits):
    tokens = torch.full((len(logits), 1), -7, dtype=torch.int64)
    sampler_.sample(logits, tokens)
    return tokens.flatten().tolist()


def weights_of(logits, seen=None, **options):
    """The integer weights that a fresh sampler would draw from."""
    fresh = sampler(*logits.shape, **options)
    if seen is not None:
        fresh.observe(seen)
    return fresh._native.weights(logits)


def assert_probabilities(actual, expected):
    """Relative to what float32 does to a difference of scores, and to the roundings of 2^-40 of a weight."""
    assert actual.shape == expected.shape
    bound = PROBABILITY_ERROR * expected + WEIGHT_ROUNDING * expected.max()
    worst = ((actual - expected).abs() - bound).argmax()
    assert bool(((actual - expected).abs() <= bound).all()), (
        f"at {worst}: got {actual[worst]}, expected {expected[worst]}"
    )


# Greedy


@pytest.mark.parametrize("vocab", SIZES)
def test_greedy_takes_the_first_maximum(vocab, isa, generator):
    logits = torch.randn(3, vocab, generator=generator)
    logits[1] = logits[1].round()
    logits[2] = -2.5
    first = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert drawn(sampler(3, vocab), logits) == first


@pytest.mark.parametrize("place", [0, 15, 16, 1023, 1024, 2999])
def test_greedy_finds_a_maximum_anywhere_and_the_first_of_two(place, isa):
    logits = torch.full((1, 3000), -1.0)
    logits[0, place] = 3.0
    assert drawn(sampler(1, 3000), logits) == [place]
    logits[0, 2999] = 3.0
    assert drawn(sampler(1, 3000), logits) == [place]


def test_greedy_keeps_to_the_penalised_logits(isa):
    logits = torch.tensor([[1.0, 2.0, 1.5, -1.0]])
    greedy = sampler(1, 4, repetition_penalty=2.0)
    # 2 becomes 1; then 1.5 becomes 0.75; then the first of two ones, which becomes 0.5; then the other
    assert [drawn(greedy, logits)[0] for _ in range(4)] == [1, 2, 0, 1]


def test_both_zeros_are_equal(isa):
    assert drawn(sampler(1, 3), torch.tensor([[-0.0, 0.0, -0.0]])) == [0]
    weights = weights_of(torch.tensor([[-0.0, 0.0, -0.0, -1.0]]), temperature=1.0, top_k=1)
    assert (weights > 0).tolist() == [[True, True, True, False]]


# What is drawn from


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 2000},
        {"top_k": 10**9},
        {"top_p": 0.9},
        {"top_p": 1e-300},
        {"top_p": 0.999999},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.2},
        {"repetition_penalty": 0.5},
    ],
    ids=str,
)
def test_probabilities_are_those_of_the_processors(vocab, options, isa, generator):
    logits = torch.randn(1, vocab, generator=generator) * 3
    seen = torch.randint(vocab, (1, 40), generator=generator)
    options = {"temperature": 1.0, **options}
    fresh = sampler(1, vocab, **options)
    fresh.observe(seen)
    names = {"repetition_penalty": "penalty"}
    expected = reference.probabilities(
        logits[0], seen[0].tolist(), **{names.get(k, k): v for k, v in options.items()}
    )
    actual = fresh.probabilities(logits)[0]
    assert torch.equal(actual > 0, expected > expected.max() * 2.0**-41)
    assert_probabilities(actual, expected)


@pytest.mark.parametrize(
    ("scale", "options"),
    [(0.01, {"top_p": 0.5}), (0.01, {"top_k": 3000}), (8.0, {"top_p": 0.99}), (8.0, {"top_k": 5})],
    ids=str,
)
def test_flat_and_peaked_distributions(scale, options, isa, generator):
    logits = torch.randn(1, 5000, generator=generator) * scale
    expected = reference.probabilities(logits[0], temperature=1.0, **options)
    actual = sampler(1, 5000, temperature=1.0, **options).probabilities(logits)[0]
    assert torch.equal(actual > 0, expected > expected.max() * 2.0**-41)
    assert_probabilities(actual, expected)


def test_transformers_own_processors_agree(isa, generator):
    from transformers.generation import logits_process as processors

    logits = torch.randn(2, 1000, generator=generator) * 2
    seen = torch.randint(1000, (2, 60), generator=generator)
    scores = logits.double()
    for process in (
        processors.RepetitionPenaltyLogitsProcessor(1.25),
        processors.TemperatureLogitsWarper(0.75),
        processors.TopKLogitsWarper(200),
        processors.TopPLogitsWarper(0.7),
    ):
        scores = process(seen, scores)
    fresh = sampler(2, 1000, repetition_penalty=1.25, temperature=0.75, top_k=200, top_p=0.7)
    fresh.observe(seen)
    actual, expected = fresh.probabilities(logits), scores.softmax(-1)
    assert torch.equal(actual > 0, expected > 0)
    for row in range(2):
        assert_probabilities(actual[row], expected[row])


SCORES = st.one_of(
    st.sampled_from([-INF, -3.0, -1.0, -0.0, 0.0, 0.5, 1.0]),
    st.floats(-60, 60, width=32, allow_subnormal=False),
)


@given(
    logits=st.lists(SCORES, min_size=1, max_size=70),
    temperature=st.sampled_from([0.25, 1.0, 2.0, 1.7]),
    top_k=st.integers(0, 80),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.75, 0.9, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
    seen=st.lists(st.integers(0, 69), max_size=20),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_kept_sets_and_draws_are_exact(logits, temperature, top_k, top_p, penalty, seen, seed):
    """Every step in integers behind the weights: ties, -inf, and thresholds between equal values."""
    vocab = len(logits)
    row = torch.tensor([logits])
    ids = torch.tensor([[i for i in seen if i < vocab]], dtype=torch.int64)
    if not bool((row > -INF).any()):
        return
    options = {"temperature": temperature, "repetition_penalty": penalty, "seed": seed}
    scores = reference.penalised(row[0], ids[0].tolist(), penalty) / temperature
    plain = weights_of(row, ids, **options, top_k=top_k)[0]
    all_of_them = weights_of(row, ids, **options)[0]
    by_k = reference.kept_by_top_k(scores, top_k)
    assert torch.equal(plain, torch.where(by_k, all_of_them, 0))
    by_p = (
        reference.kept_by_top_p(plain.tolist(), scores.tolist(), top_p)
        if top_p < 1
        else torch.ones_like(by_k)
    )
    expected = torch.where(by_p, plain, 0)
    first = None
    for name in mambaquant_ext.supported_isas():
        with mambaquant_ext.forced_isa(name):
            weights = weights_of(row, ids, **options, top_k=top_k, top_p=top_p)[0]
            assert torch.equal(weights, expected), name
            fresh = sampler(1, vocab, **options, top_k=top_k, top_p=top_p)
            fresh.observe(ids)
            token = drawn(fresh, row)[0]
        assert token == reference.draw(expected.tolist(), reference.random_bits(seed, 0, 0)), name
        first = token if first is None else first
        assert token == first


def test_equal_tokens_are_cut_by_their_ids(isa):
    """top_p = 0.5 of ten equal tokens keeps the first five, of eleven the first six."""
    for count, kept in ((10, 5), (11, 6)):
        weights = weights_of(torch.zeros(1, count), temperature=1.0, top_p=0.5)[0]
        assert (weights > 0).nonzero().flatten().tolist() == list(range(kept))


def test_top_k_keeps_all_that_equal_the_last(isa):
    logits = torch.tensor([[3.0, 1.0, 2.0, 1.0, 0.0, 1.0]])
    weights = weights_of(logits, temperature=1.0, top_k=3)[0]
    assert (weights > 0).tolist() == [True, True, True, True, False, True]


def test_fewer_finite_logits_than_top_k(isa):
    logits = torch.full((1, 2000), -INF)
    logits[0, [5, 1500]] = torch.tensor([1.0, 2.0])
    weights = weights_of(logits, temperature=1.0, top_k=40, top_p=0.99)[0]
    assert weights.nonzero().flatten().tolist() == [5, 1500]


def test_one_token_of_all_probability(isa):
    logits = torch.full((1, 300), -200.0)
    logits[0, 123] = 100.0
    for options in ({}, {"top_p": 0.999999999}, {"top_k": 10}):
        weights = weights_of(logits, temperature=1.0, **options)[0]
        assert weights.nonzero().flatten().tolist() == [123]


def test_a_repeated_id_is_penalised_once(isa):
    logits = torch.tensor([[2.0, -2.0, 2.0]])
    options = {"temperature": 1.0, "repetition_penalty": 1.5}
    once = weights_of(logits, torch.tensor([[0, 1]]), **options)
    assert torch.equal(once, weights_of(logits, torch.tensor([[0, 1, 1, 0, 0, 1]]), **options))
    expected = torch.tensor([2.0 / 1.5, -2.0 * 1.5, 2.0], dtype=torch.float64).softmax(-1)
    assert_probabilities(once[0].double() / once.sum(), expected)


# Draws


def test_draws_follow_the_documented_numbers(isa, generator):
    logits = torch.randn(3, 257, generator=generator)
    options = {"temperature": 0.9, "top_p": 0.95}
    weights = weights_of(logits, **options).tolist()
    for seed in (0, 7, -1):
        fresh = sampler(3, 257, **options, seed=seed)
        for step in range(20):
            expected = [
                reference.draw(weights[row], reference.random_bits(seed, row, step))
                for row in range(3)
            ]
            assert drawn(fresh, logits) == expected


def test_frequencies_are_the_probabilities():
    """Chi-square over 64 tokens and 20,000 draws: above 120 once in 10^5 seeds."""
    logits = torch.linspace(-2, 1, 64)[None]
    fresh = sampler(1, 64, temperature=1.0, seed=3)
    expected = 20_000 * logits[0].double().softmax(-1)
    counts = torch.zeros(64, dtype=torch.float64)
    for _ in range(20_000):
        counts[drawn(fresh, logits)[0]] += 1
    assert float(((counts - expected) ** 2 / expected).sum()) < 120


def test_random_numbers_are_uniform_over_sequences_and_steps():
    bits = [reference.random_bits(11, row, step) for row in range(100) for step in range(100)]
    assert len(set(bits)) == len(bits)
    mean = sum(bits) / len(bits) / 2**64
    assert abs(mean - 0.5) < 4 / (12 * len(bits)) ** 0.5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neither_threads_nor_batch_change_a_draw(threads, generator):
    logits = torch.randn(5, 4000, generator=generator)
    options = {"temperature": 1.2, "top_k": 100, "repetition_penalty": 1.1, "seed": 5}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = sampler(5, 4000, **options)
        rows = [drawn(together, logits) for _ in range(6)]
    finally:
        torch.set_num_threads(before)
    alone = sampler(1, 4000, **options)
    assert [row[0] for row in rows] == [drawn(alone, logits[:1])[0] for _ in range(6)]
    again = sampler(5, 4000, **options)
    assert rows == [drawn(again, logits) for _ in range(6)]


def test_rows_may_lie_apart(isa, generator):
    wide = torch.randn(3, 200, generator=generator)
    options = {"temperature": 1.0, "top_k": 9}
    view = wide[:, 20:120]
    assert not view.is_contiguous()
    assert torch.equal(weights_of(view, **options), weights_of(view.contiguous(), **options))


def test_logits_are_left_as_they_were(isa, generator):
    logits = torch.randn(1, 500, generator=generator)
    before = logits.clone()
    fresh = sampler(1, 500, temperature=0.5, top_k=7, top_p=0.5, repetition_penalty=2.0)
    fresh.observe(torch.arange(100)[None])
    drawn(fresh, logits)
    fresh.probabilities(logits)
    assert torch.equal(logits, before)


def test_looking_at_probabilities_draws_nothing(generator):
    logits = torch.randn(1, 300, generator=generator)
    one, other = (sampler(1, 300, temperature=1.0, seed=1) for _ in range(2))
    first = drawn(one, logits), drawn(one, logits)
    second = drawn(other, logits)
    other.probabilities(logits)
    assert first == (second, drawn(other, logits))


def test_probabilities_of_greedy_are_one_token(isa):
    assert sampler(1, 3).probabilities(torch.tensor([[0.0, 2.0, 1.0]])).tolist() == [[0, 1, 0]]


# What is refused


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("vocab", [1, 16, 17, 1500])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad, vocab, temperature, isa):
    logits = torch.zeros(2, vocab)
    for place in {0, vocab // 2, vocab - 1}:
        logits.zero_()
        logits[1, place] = bad
        with pytest.raises(ValueError, match=r"finite or -inf, got NaN or \+inf in row 1"):
            drawn(sampler(2, vocab, temperature=temperature, top_k=3), logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [1, 40])
def test_a_row_without_a_token_is_an_error(temperature, vocab, isa):
    logits = torch.zeros(2, vocab)
    logits[0] = -INF
    with pytest.raises(ValueError, match="expected a logit above -inf, got none in row 0"):
        drawn(sampler(2, vocab, temperature=temperature, top_p=0.5), logits)


def test_scores_that_overflow_are_an_error(isa):
    with pytest.raises(ValueError, match="finite"):
        drawn(sampler(1, 2, temperature=1e-38), torch.tensor([[100.0, 0.0]]))


@pytest.mark.parametrize(
    ("logits", "tokens", "error", "says"),
    [
        (torch.zeros(1, 8), torch.zeros(2, 1).long(), ValueError, r"logits of shape \(batch, vocab\)"),
        (torch.zeros(2, 9), torch.zeros(2, 1).long(), ValueError, r"logits of shape \(batch, vocab\)"),
        (torch.zeros(16), torch.zeros(2, 1).long(), ValueError, r"logits of shape \(batch, vocab\)"),
        (torch.zeros(2, 8).double(), torch.zeros(2, 1).long(), TypeError, "logits of dtype Float"),
        (torch.zeros(8, 2).T, torch.zeros(2, 1).long(), ValueError, "contiguous last dimension"),
        (torch.zeros(2, 8), torch.zeros(2).long(), ValueError, r"tokens of shape \(batch, 1\)"),
        (torch.zeros(2, 8), torch.zeros(2, 1), TypeError, "tokens of dtype Long"),
        (torch.zeros(2, 8), torch.zeros(2, 2).long()[:, :1], ValueError, "tokens to be contiguous"),
        (torch.zeros(2, 8, device="meta"), torch.zeros(2, 1).long(), ValueError, "logits on device"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(logits, tokens, error, says):
    with pytest.raises(error, match=says):
        sampler(2, 8).sample(logits, tokens)


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        (torch.zeros(2).long(), ValueError, "ids with 2 dimensions"),
        (torch.zeros(1, 3).long(), ValueError, r"ids of shape \(batch, n\)"),
        (torch.zeros(2, 3), TypeError, "ids of dtype Long"),
        (torch.tensor([[0], [8]]), IndexError, "ids below 8, got 8"),
        (torch.tensor([[0], [-1]]), IndexError, "ids below 8, got -1"),
    ],
)
@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_prompts_that_do_not_fit(ids, error, says, penalty):
    with pytest.raises(error, match=says):
        sampler(2, 8, repetition_penalty=penalty).observe(ids)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 0}, "batch of at least 1, got 0"),
        ({"vocab": 0}, "vocabulary of 1 to 4194304, got 0"),
        ({"vocab": 2**22 + 1}, "vocabulary of 1 to 4194304, got 4194305"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": INF}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    ],
)
def test_native_options_that_do_not_fit(changes, says):
    options = {
        "batch": 1,
        "vocab": 8,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=says):
        torch.classes.mambaquant.Sampler(*{**options, **changes}.values())


def test_the_default_dtype_and_device_are_not_asked():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            fresh = sampler(1, 3, temperature=1.0, top_k=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn(fresh, logits) == [1]


def test_any_number_of_likeliest_tokens_above_the_vocabulary_is_all():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    expected = sampler(1, 3, temperature=1.0).probabilities(logits)
    for top_k in (3, 4, 2**63, 10**30):
        assert_equal(sampler(1, 3, temperature=1.0, top_k=top_k).probabilities(logits), expected)
