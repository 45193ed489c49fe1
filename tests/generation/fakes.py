"""What the tests of the loop run on: tokenizers whose tokens are known, and a model that is a plain function."""

from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models


def byte_level(words=()):
    """A byte-level tokenizer whose first 256 tokens are the bytes themselves, then `words`, then a special token."""
    names = [_name_of(bytes([byte])) for byte in range(256)]
    names += [_name_of(word if isinstance(word, bytes) else word.encode()) for word in words]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, names[0]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def _name_of(data):
    """The characters by which byte-level tokenizers write bytes: printable ones as they are, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(
        chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in data
    )


def byte_fallback(words):
    """A tokenizer in the manner of sentencepiece: bytes as <0x..>, words with ▁ for a space, which the first loses."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + list(words)
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, names[0]))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@dataclass
class FakeState:
    """All tokens so far, as sequences of ints."""

    read: list = field(default_factory=list)


class FakeRunner:
    """A model whose next token is `following(tokens so far)`; its logits are 1 there and 0.5 elsewhere."""

    def __init__(self, vocab_size, following):
        self.vocab_size, self.following = vocab_size, following
        self.reads = []  # the shape of each call

    def new_state(self, batch=1):
        return FakeState([[] for _ in range(batch)])

    def forward(self, ids, state, out=None):
        assert ids.dtype == torch.int64
        assert len(ids) == len(state.read)
        self.reads.append(tuple(ids.shape))
        out = torch.empty(len(ids), self.vocab_size) if out is None else out
        out.fill_(0.5)
        for row, new in enumerate(ids.tolist()):
            state.read[row] += new
            out[row, self.following(state.read[row])] = 1.0
        return out


def script(*continuations, prompt_length):
    """`following` of a model that says continuation i behind a prompt that begins with token i."""

    def following(tokens):
        said = continuations[tokens[0]]
        return said[(len(tokens) - prompt_length) % len(said)]

    return following
