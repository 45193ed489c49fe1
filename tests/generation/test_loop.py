"""The loop, on a model that is a plain function of its tokens."""

import pytest
import torch

from generation.fakes import FakeRunner, byte_level, script
from mambaquant_ext import FinishReason, GenerationOptions, generate, stream

TOKENIZER = byte_level([" Paris", "\nQ", ": "])
VOCAB = 260
PARIS, QUESTION, COLON, END = 256, 257, 258, 259


def says(*continuations, prompt_length=1):
    """A model that continues a prompt that begins with token i by continuation i."""
    tokens = [list(c.encode()) if isinstance(c, str) else c for c in continuations]
    return FakeRunner(VOCAB, script(*tokens, prompt_length=prompt_length))


def run(runner, ids, tokenizer=TOKENIZER, **options):
    return generate(runner, ids, GenerationOptions(**options), tokenizer)


# Ends


def test_length():
    (one,) = run(says("abcdef"), [0], max_new_tokens=4).sequences
    assert (one.ids, one.text, one.finish) == (tuple(b"abcd"), "abcd", FinishReason.LENGTH)


def test_eos_is_among_the_tokens_and_not_in_the_text():
    (one,) = run(says([*b"ab", END, *b"c"]), [0], eos_ids=(7, END)).sequences
    assert (one.ids, one.text, one.finish) == ((*b"ab", END), "ab", FinishReason.EOS)


def test_eos_wins_over_length():
    (one,) = run(says([*b"a", END]), [0], eos_ids=(END,), max_new_tokens=2).sequences
    assert one.finish is FinishReason.EOS


def test_stop_string_over_several_tokens():
    runner = says([PARIS, *b".", QUESTION, COLON, *b"what"])
    steps = stream(runner, [0], GenerationOptions(stop=("\nQ:",)), TOKENIZER)
    pieces = [step.pieces[0] for step in steps]
    (one,) = steps.result.sequences
    assert pieces == [" Paris", ".", "", ""]
    assert (one.text, one.finish) == (" Paris.", FinishReason.STOP)
    assert one.ids == (PARIS, *b".", QUESTION, COLON)


def test_the_beginning_of_a_stop_string_comes_out_at_the_end():
    for ending in ({"max_new_tokens": 3}, {"eos_ids": (END,)}):
        (one,) = run(says([*b"ab", QUESTION, END]), [0], stop=("\nQ:",), **ending).sequences
        assert one.text == "ab\nQ"
        assert one.finish is not FinishReason.STOP


def test_a_stop_string_that_the_last_token_completes():
    (one,) = run(says("abc"), [0], stop=("bc",), max_new_tokens=3).sequences
    assert (one.text, one.finish) == ("a", FinishReason.STOP)


def test_characters_of_several_tokens():
    runner = says("é🙂")
    steps = stream(runner, [0], GenerationOptions(max_new_tokens=5), TOKENIZER)
    assert [step.pieces[0] for step in steps] == ["", "é", "", "", "\ufffd"]
    steps = stream(runner, [0], GenerationOptions(max_new_tokens=6), TOKENIZER)
    assert "".join(step.pieces[0] for step in steps) == "é🙂"


def test_without_a_tokenizer_there_are_tokens_alone():
    (one,) = run(says("abc"), [0], None, max_new_tokens=3).sequences
    assert (one.ids, one.text) == (tuple(b"abc"), "")


# The model


def test_a_prompt_is_read_at_once_and_each_token_once():
    runner = says("abc", prompt_length=5)
    state = runner.new_state(1)
    generate(runner, [0, 1, 2, 3, 4], GenerationOptions(max_new_tokens=3), state=state)
    assert runner.reads == [(1, 5), (1, 1), (1, 1)]
    assert state.read == [[0, 1, 2, 3, 4, *b"ab"]]


def test_a_conversation_goes_on_from_its_state():
    runner = FakeRunner(VOCAB, lambda tokens: (31 * sum(tokens) + len(tokens)) % VOCAB)
    options = GenerationOptions(max_new_tokens=4)
    state = runner.new_state(2)
    first = generate(runner, [[1, 2], [3, 4]], options, state=state)
    prompt = torch.cat([first.unread, torch.tensor([[5], [6]])], 1)
    second = generate(runner, prompt, options, state=state)
    whole = torch.tensor(
        [
            [*start, *one.ids, new]
            for start, one, new in zip(([1, 2], [3, 4]), first.sequences, (5, 6), strict=True)
        ]
    )
    assert second.sequences == generate(runner, whole, options).sequences


def test_a_generation_may_be_left_and_continued():
    steps = stream(says("abcdef"), [0], GenerationOptions(max_new_tokens=5), TOKENIZER)
    assert next(steps).pieces == ("a",)
    assert steps.result.sequences[0].finish is None
    assert steps.result.sequences[0].text == "a"
    assert [step.pieces[0] for step in steps] == list("bcde")
    assert next(steps, None) is None


def test_options_reach_the_sampler():
    runner = FakeRunner(8, lambda tokens: 3)
    assert run(runner, [0], None, max_new_tokens=6).sequences[0].ids == (3,) * 6
    penalised = run(runner, [3], None, max_new_tokens=3, repetition_penalty=1e9)
    assert penalised.sequences[0].ids == (0, 1, 2)
    sampled = [
        run(runner, [0], None, max_new_tokens=30, temperature=5.0, seed=seed).sequences[0].ids
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    top = run(runner, [0], None, max_new_tokens=30, temperature=5.0, top_k=1).sequences[0].ids
    assert top == (3,) * 30
    nucleus = run(runner, [0], None, max_new_tokens=30, temperature=5.0, top_p=0.01)
    assert nucleus.sequences[0].ids == (3,) * 30


def test_the_penalty_counts_the_prompt():
    runner = FakeRunner(4, lambda tokens: 2)
    options = {"max_new_tokens": 1, "repetition_penalty": 3.0}
    assert run(runner, [0, 1], None, **options).sequences[0].ids == (2,)
    assert run(runner, [0, 2], None, **options).sequences[0].ids == (1,)


# Batches


def test_sequences_end_each_by_itself():
    runner = says("abcdefgh", [*b"xy", END, *b"z"], [PARIS, QUESTION, COLON])
    steps = stream(
        runner,
        [[0], [1], [2]],
        GenerationOptions(max_new_tokens=5, eos_ids=(END,), stop=("Q",)),
        TOKENIZER,
    )
    every = list(steps)
    assert [step.tokens for step in every] == [
        (ord("a"), ord("x"), PARIS),
        (ord("b"), ord("y"), QUESTION),
        (ord("c"), END, None),
        (ord("d"), None, None),
        (ord("e"), None, None),
    ]
    assert [step.pieces for step in every][:3] == [
        ("a", "x", " Paris"),
        ("b", "y", "\n"),
        ("c", "", ""),
    ]
    result = steps.result
    assert [one.text for one in result.sequences] == ["abcde", "xy", " Paris\n"]
    assert [one.finish.value for one in result.sequences] == ["length", "eos", "stop"]
    assert result.tokens == 5 + 3 + 2
    assert result.unread is None


def test_a_batch_says_what_its_sequences_say_alone():
    runner = FakeRunner(VOCAB, lambda tokens: (7 * sum(tokens) + 3 * len(tokens)) % 256)
    prompts = torch.tensor([[1, 2, 3], [9, 8, 7]])
    together = run(runner, prompts, max_new_tokens=20).sequences
    alone = [run(runner, prompt, max_new_tokens=20).sequences[0] for prompt in prompts]
    assert list(together) == alone


def test_prompts_come_as_tensors_or_lists():
    for ids in ([5, 6], (5, 6), [[5, 6]], torch.tensor([5, 6]), torch.tensor([[5, 6]])):
        runner = FakeRunner(VOCAB, sum)
        assert run(runner, ids, max_new_tokens=1).sequences[0].ids == (11,)
        assert runner.reads == [(1, 2)]


# Figures


def test_figures_of_a_run(monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("mambaquant_ext.generation.loop.time.perf_counter", lambda: next(clock))
    result = run(says("abcdefgh", "xy", prompt_length=3), [[0, 5, 5], [1, 5, 5]], max_new_tokens=4)
    assert result.prompt_tokens == 6
    assert result.tokens == 8
    assert result.time_to_first_token == 2
    assert result.decode_seconds == 6
    assert result.prompt_tokens_per_second == 3
    assert result.tokens_per_second == 1


def test_one_token_has_no_decoding_rate():
    result = run(says("a"), [0], max_new_tokens=1)
    assert (result.decode_seconds, result.tokens_per_second) == (0, 0)
    assert result.time_to_first_token > 0


# What is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -0.1}, "temperature: expected finite and at least 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k: expected at least 0"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1, got 0.0"),
        ({"top_p": 1.01}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"stop": ("a", "")}, "stop: expected strings that are not empty"),
        ({"eos_ids": (1, -1)}, "eos_ids"),
        ({"seed": 2**63}, "seed: expected an int of 64 bits"),
    ],
    ids=str,
)
def test_options_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        GenerationOptions(**options)


def test_a_single_string_is_no_list_of_stop_strings():
    with pytest.raises(TypeError, match="stop: expected a tuple of strings, got the string 'END'"):
        GenerationOptions(stop="END")


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        ([], ValueError, "at least one token"),
        ([[], []], ValueError, "at least one token"),
        (torch.empty(0, 4, dtype=torch.int64), ValueError, "at least one token"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, "batch, seqlen"),
        ([[1, 2], [3]], ValueError, r"prompts of one length, got \[1, 2\] tokens"),
        ([VOCAB], IndexError, "ids below 260, got 260"),
        ([-1], IndexError, "ids below 260, got -1"),
        (torch.tensor([[1]], dtype=torch.int32), TypeError, "dtype Long"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_read(ids, error, says):
    with pytest.raises(error, match=says):
        run(FakeRunner(VOCAB, sum), ids)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="stop: expected a tokenizer"):
        run(says("abc"), [0], None, stop=("b",))


def test_a_model_that_gives_nan_is_an_error():
    class Broken(FakeRunner):
        def forward(self, ids, state, out=None):
            return torch.full((1, VOCAB), float("nan"))

    with pytest.raises(ValueError, match="NaN"):
        run(Broken(VOCAB, sum), [0])
