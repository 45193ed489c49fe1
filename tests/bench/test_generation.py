"""bench.generation: every case is right and runs; how long it takes is no matter here."""

import pytest
import torch
from bench.docs_model import FOLDER
from tokenizers import Tokenizer

from bench import generation


@pytest.mark.parametrize("name", generation.OPTIONS)
def test_every_case_is_checked_and_can_be_called(name):
    torch.manual_seed(0)
    logits, options = generation.make_logits(3.0), generation.OPTIONS[name]
    generation.check(logits, options)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ours = generation.ours(logits, options, tokenizer)
    steps = [ours() for _ in range(3)]
    assert all(0 <= step.tokens[0] < generation.VOCABULARY for step in steps)
    token = generation.by_transformers(logits, options)()
    if options == {}:
        assert steps[0].tokens == (int(token),)


def test_a_wrong_sampler_is_not_timed(monkeypatch):
    monkeypatch.setattr(generation.reference, "penalised", lambda logits, *_: -logits)
    with pytest.raises(AssertionError, match="probabilities: off by"):
        generation.check(generation.make_logits(3.0), generation.OPTIONS["greedy"])
