"""llama.cpp by its C interface, so that no Python of llama-cpp-python's own stands between calls."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from bench.cpu.engines.engine import PROMPT
from bench.cpu.models.token_ids import token_ids

# Measured on two cores: from 64 to 1,024 the size of a micro-batch moves prefill by 4 % at most.
MICRO_BATCH, BATCH = 512, 2048
CONTEXT = 1 << 17  # positions; a Mamba's state does not grow with it


@llama_cpp.llama_log_callback
def _silent(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """llama.cpp's log, dropped."""


@dataclass
class Sequences:
    """Sequences that are being decoded: their context, and the ids that each step reads."""

    context: Any
    batch: Batch
    position: int


class LlamaEngine:
    """A model, and a context for each batch size."""

    def __init__(self, path: Path, threads: int) -> None:
        """Loads a GGUF file.

        Raises:
            OSError: llama.cpp refuses it.
        """
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise OSError(f"{path}: expected a GGUF file that llama.cpp loads")
        self._threads = threads
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._contexts: dict[int, Any] = {}
        self.settings = (
            f"n_ubatch {MICRO_BATCH}, n_batch {BATCH}, n_threads and n_threads_batch as ours, repacked weights, "
            "llama_decode called directly"
        )

    def prompts(self, batch: int, tokens: int) -> list[Batch]:
        """The calls that read the prompts, at most BATCH tokens each, every sequence as many."""
        ids = token_ids(self._vocab, batch, tokens).tolist()
        chunk = BATCH // batch
        return [
            Batch([row[begin : begin + chunk] for row in ids], begin, begin + chunk >= tokens)
            for begin in range(0, tokens, chunk)
        ]

    def prefill(self, ids: list[Batch]) -> np.ndarray[Any, Any]:
        """Logits of the last tokens, from a state that is set back."""
        count = ids[0].count
        context = self._context(count)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        for batch in ids:
            self._decode(context, batch)
        return self._logits(context, count)

    def start(self, batch: int) -> Sequences:
        """Sequences behind a prompt, in a context of their own."""
        context = self._new_context(batch)
        for part in self.prompts(batch, PROMPT):
            self._decode(context, part)
        return Sequences(context, self.prompts(batch, 1)[0], PROMPT)

    def step(self, sequences: Sequences) -> np.ndarray[Any, Any]:
        """Logits of one more token; the state goes on."""
        batch = sequences.batch
        for index in range(batch.count):
            batch.values.pos[index] = sequences.position
        sequences.position += 1
        self._decode(sequences.context, batch)
        return self._logits(sequences.context, batch.count)

    def _context(self, batch: int) -> Any:
        if batch not in self._contexts:
            self._contexts[batch] = self._new_context(batch)
        return self._contexts[batch]

    def _new_context(self, batch: int) -> Any:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = CONTEXT * batch
        options.n_batch, options.n_ubatch = BATCH, MICRO_BATCH
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = self._threads
        options.no_perf = True
        context = llama_cpp.llama_init_from_model(self._model, options)
        if not context:
            raise OSError(f"llama.cpp: no context for {batch} sequences")
        return context

    @staticmethod
    def _decode(context: Any, batch: Batch) -> None:
        code = llama_cpp.llama_decode(context, batch.values)
        if code != 0:
            raise RuntimeError(f"llama_decode: code {code}")

    def _logits(self, context: Any, count: int) -> np.ndarray[Any, Any]:
        """(count, vocab); in the order of the sequences, whose last tokens alone have logits."""
        pointers = (
            llama_cpp.llama_get_logits_ith(context, index - count) for index in range(count)
        )
        return np.stack([np.ctypeslib.as_array(p, (self._vocab,)) for p in pointers])


class Batch:
    """A llama_batch: tokens of several sequences, one after another."""

    def __init__(self, rows: list[list[int]], first_position: int, is_last: bool) -> None:
        """Token ids of each sequence, where they stand, and whether the last of each has logits."""
        self.count = len(rows)
        self.values = llama_cpp.llama_batch_init(sum(map(len, rows)), 0, 1)
        index = 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                self.values.token[index] = token
                self.values.pos[index] = first_position + offset
                self.values.n_seq_id[index] = 1
                self.values.seq_id[index][0] = sequence
                self.values.logits[index] = is_last and offset == len(row) - 1
                index += 1
        self.values.n_tokens = index


def load(_variant: str, path: Path, threads: int) -> LlamaEngine:
    """The model of a GGUF file."""
    return LlamaEngine(path, threads)
