"""The small language model of tests/data, its texts, and its evaluation protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mambaquant_ext.cli.console import progress_bar
from mambaquant_ext.cli.sampling import pick
from mambaquant_ext.cli.text import load_tokenizer, token_windows
from mambaquant_ext.evaluate import Evaluation, evaluate
from mambaquant_ext.model.checkpoint import load_float_model

FOLDER = Path(__file__).parent.parent / "tests" / "data" / "mamba-lm-docs"
WINDOW = 512
CALIBRATION_WINDOWS = 64
BATCH = 4


@dataclass(frozen=True)
class DocsModel:
    """Everything that a measurement on this model needs."""

    model: Any
    tokenizer: Any
    calibration: list[Tensor]
    test: Tensor
    bytes_per_token: float

    def evaluate(self, logits: Callable[[Tensor], Tensor], what: str) -> Evaluation:
        with progress_bar(what, len(self.test), "window") as update:
            return evaluate(logits, self.test, self.bytes_per_token, BATCH, update)


def load(calibration_windows: int = CALIBRATION_WINDOWS) -> DocsModel:
    tokenizer = load_tokenizer(FOLDER)
    calibration, _ = token_windows(FOLDER / "calib.txt", tokenizer, WINDOW)
    chosen = pick(calibration, calibration_windows, seed=0)
    test, bytes_per_token = token_windows(FOLDER / "test.txt", tokenizer, WINDOW)
    return DocsModel(
        load_float_model(FOLDER), tokenizer, list(chosen.split(BATCH)), test, bytes_per_token
    )
