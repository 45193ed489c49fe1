"""What an engine is asked for, and which engines there are."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

OURS, OURS_AVX2 = "ours", "ours, AVX2"
# Files of a model's folder, which bench.cpu.models makes.
FLOAT, W8A8, PREPACKED = "float", "w8a8", "w8a8-prepacked"
PROMPT = 16  # tokens before the decoded ones


class Engine(Protocol):
    """One language model in one engine, on the threads that it was loaded for."""

    settings: str  # what was chosen for this engine, in words

    def prefill(self, ids: Any) -> Any:
        """Reads prompts from a fresh state.

        Args:
            ids: from prompts().

        Returns:
            Logits of the last token of each, of whatever kind: (batch, vocab).
        """
        ...

    def prompts(self, batch: int, tokens: int) -> Any:
        """Prompts as this engine takes them, made outside of the timing."""
        ...

    def start(self, batch: int) -> Any:
        """Sequences behind a prompt of PROMPT tokens, for step()."""
        ...

    def step(self, sequences: Any) -> Any:
        """Decodes one token of each sequence; logits as prefill()."""
        ...


@dataclass(frozen=True)
class EngineKind:
    """An engine in one of its formats.

    Attributes:
        module: of this folder.
        variant: which format, as the module calls it.
        file: of the model's folder that it loads.
        needs: packages.
        bytes_per_parameter: while it loads, at most: what decides whether a model fits in memory.
        is_unfused: whether it holds the scan's states of every token, several times.
        environment: of its process.
    """

    module: str
    variant: str
    file: str
    needs: tuple[str, ...]
    bytes_per_parameter: float
    is_unfused: bool = False
    environment: dict[str, str] = field(default_factory=dict)


_LLAMA = ("llama_cpp", "gguf")
# The order of the columns. The most telling peers come first: where memory is short the last ones are left out.
ENGINES = {
    OURS: EngineKind("ours", "int8", W8A8, (), 4),
    OURS_AVX2: EngineKind("ours", "int8", W8A8, (), 4, environment={"MAMBAQUANT_CPU_ISA": "avx2"}),
    "llama.cpp Q8_0": EngineKind("llama", "Q8_0", "Q8_0.gguf", _LLAMA, 1.5),
    "llama.cpp Q4_0": EngineKind("llama", "Q4_0", "Q4_0.gguf", _LLAMA, 1.5),
    "llama.cpp F16": EngineKind("llama", "F16", "F16.gguf", _LLAMA, 2.5),
    "transformers bfloat16": EngineKind("torch_models", "bfloat16", FLOAT, (), 7, True),
    "transformers float32": EngineKind("torch_models", "float32", FLOAT, (), 9, True),
    "torch.ao dynamic int8": EngineKind("torch_models", "dynamic int8", FLOAT, (), 9, True),
    "mambapy float32": EngineKind("mamba_py", "float32", FLOAT, ("mambapy",), 9, True),
}


# Ours from disk, in every way: by the function that loads, weights packed then or mapped from a packed image.
PACKING, MAPPED = "load_runner, packing", "load_runner, mapped"
WAYS = {
    "load, packing": EngineKind("torch_models", "w8a8", W8A8, (), 4),
    "load, packing, unverified": EngineKind("torch_models", "w8a8, unverified", W8A8, (), 4),
    "load, mapped": EngineKind("torch_models", "w8a8", PREPACKED, (), 4),
    "load, mapped, verified": EngineKind("torch_models", "w8a8, verified", PREPACKED, (), 4),
    PACKING: ENGINES[OURS],
    MAPPED: replace(ENGINES[OURS], file=PREPACKED),
}
KINDS = {**ENGINES, **WAYS}


def installed(kind: EngineKind) -> bool:
    """Whether its packages are there."""
    return all(importlib.util.find_spec(name) is not None for name in kind.needs)


def engine_module(kind: EngineKind) -> Any:
    """The module of this folder, and with it the packages that it needs."""
    return importlib.import_module(f"bench.cpu.engines.{kind.module}")


def load(kind: EngineKind, folder: Path, threads: int) -> Engine:
    """The engine with its model in memory.

    Args:
        kind: of KINDS.
        folder: of the model, of bench.cpu.models.
        threads: to compute with.
    """
    engine: Engine = engine_module(kind).load(kind.variant, folder / kind.file, threads)
    return engine
