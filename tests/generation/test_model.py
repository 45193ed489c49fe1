"""The loop on the trained model: what its native runner, its modules and transformers' own generate() say."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import MambaForCausalLM

from mambaquant_ext import GenerationOptions, LanguageRunner, generate, quantize_, recipe
from mambaquant_ext.generation import ModuleRunner

FOLDER = Path(__file__).parents[1] / "data" / "mamba-lm-docs"
PROMPTS = ["The function returns", "In the beginning", "To install the package, run"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def float_model():
    return MambaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def int8_model(tokenizer):
    model = MambaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    text = (FOLDER / "calib.txt").read_text(encoding="utf-8")[:40_000]
    ids = torch.tensor(tokenizer.encode(text).ids[: 4 * 512])
    quantize_(model, [ids.view(4, 512)], recipe("w8a8"))
    return model


def greedy_by_transformers(model, ids, count):
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return tuple(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_what_transformers_generates(prompt, int8_model, tokenizer):
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    options = GenerationOptions(max_new_tokens=48, eos_ids=(0,))
    expected = greedy_by_transformers(int8_model, ids, 48)
    for runner in (LanguageRunner(int8_model), ModuleRunner(int8_model)):
        (one,) = generate(runner, ids, options, tokenizer).sequences
        assert one.ids == expected
        assert one.text == tokenizer.decode(list(expected))


def test_greedy_of_the_float_model_is_what_transformers_generates(float_model, tokenizer):
    ids = torch.tensor([tokenizer.encode(PROMPTS[0]).ids])
    options = GenerationOptions(max_new_tokens=16, eos_ids=(0,))
    (one,) = generate(ModuleRunner(float_model), ids, options, tokenizer).sequences
    assert one.ids == greedy_by_transformers(float_model, ids, 16)


def test_penalised_greedy_is_what_transformers_generates(int8_model, tokenizer):
    ids = torch.tensor([tokenizer.encode(PROMPTS[0]).ids])
    out = int8_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=48,
        do_sample=False,
        repetition_penalty=1.3,
    )
    options = GenerationOptions(max_new_tokens=48, eos_ids=(0,), repetition_penalty=1.3)
    (one,) = generate(LanguageRunner(int8_model), ids, options).sequences
    assert one.ids == tuple(out[0, ids.shape[1] :].tolist())


def test_a_batch_is_its_sequences(int8_model, tokenizer):
    rows = [tokenizer.encode(prompt).ids[:3] for prompt in PROMPTS]
    options = GenerationOptions(max_new_tokens=20, repetition_penalty=1.2)
    runner = LanguageRunner(int8_model)
    together = generate(runner, rows, options, tokenizer).sequences
    assert list(together) == [
        generate(runner, row, options, tokenizer).sequences[0] for row in rows
    ]


def test_going_on_from_a_state_reads_the_same_text(int8_model, tokenizer):
    ids = tokenizer.encode(PROMPTS[0]).ids
    options = GenerationOptions(max_new_tokens=10, temperature=0.8, top_k=50, top_p=0.9, seed=4)
    runner = LanguageRunner(int8_model)
    state = runner.new_state()
    first = generate(runner, ids, options, tokenizer, state=state)
    addition = torch.tensor([tokenizer.encode("\n\nSee also").ids])
    going_on = torch.cat([first.unread, addition], 1)
    second = generate(runner, going_on, options, tokenizer, state=state)
    whole = torch.cat([torch.tensor([ids + list(first.sequences[0].ids)]), addition], 1)
    assert second.sequences == generate(runner, whole, options, tokenizer).sequences


def test_the_float_model_goes_on_from_a_state_with_several_tokens(float_model, tokenizer):
    ids = torch.tensor([tokenizer.encode(" ".join(PROMPTS)).ids])
    runner = ModuleRunner(float_model)
    expected = runner.forward(ids, runner.new_state())
    state = runner.new_state()
    runner.forward(ids[:, :5], state)
    torch.testing.assert_close(runner.forward(ids[:, 5:], state), expected, rtol=1e-4, atol=1e-4)
