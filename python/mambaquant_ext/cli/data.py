"""What a model is calibrated and evaluated on: a text if it is a language model, images if it is a vision model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import typer
from torch import Tensor

from mambaquant_ext.cli.models import is_quantized
from mambaquant_ext.cli.pictures import Pictures
from mambaquant_ext.cli.text import Text
from mambaquant_ext.images import holds_images
from mambaquant_ext.model.checkpoint import vision_config

DEFAULT_WINDOW = 512


class Data(Protocol):
    """A text or images.

    Attributes:
        unit: what one piece of it is called.
    """

    unit: ClassVar[str]

    def __len__(self) -> int:
        """How many pieces."""

    @property
    def title(self) -> str:
        """Where from, and how much."""

    def pieces(self, count: int) -> str:
        """That many pieces in words."""

    def batches(self, model: Any, count: int, size: int, seed: int) -> list[Tensor]:
        """Pieces drawn without replacement, in their order, as the model takes them.

        Args:
            model: float.
            count: of pieces; all of them if there are fewer.
            size: pieces a batch.
            seed: chooses the pieces.

        Raises:
            ValueError: data that the model cannot take.
        """

    def score(self, model: Any, batch: int, progress: Callable[[int], None]) -> Any:
        """How good the model is.

        Args:
            model: that runs.
            batch: pieces per forward pass.
            progress: called with the number of pieces done.

        Raises:
            ValueError: data that the model cannot take.
        """

    def figures(self, score: Any, reference: Any) -> dict[str, Any]:
        """A score as plain values.

        Args:
            score: from `score`.
            reference: that of the float model, or None.
        """

    def cells(self, figures: dict[str, Any]) -> dict[str, str]:
        """Figures as cells of a table, by the names of its columns."""


def calibration_data(folder: Path, path: Path, window: int | None) -> Data:
    """The data of --calib.

    Args:
        folder: of the model, whose kind decides between text and images.
        path: of the data.
        window: of --window, or None.

    Raises:
        typer.BadParameter: the other kind of data, or windows for images.
        ValueError: a model folder or data that cannot be read.
    """
    config = vision_config(folder)
    if config is None:
        if holds_images(path):
            raise typer.BadParameter(
                f"expected a UTF-8 text, as {folder} is a language model, got images: {path}",
                param_hint="--calib",
            )
        return Text.open(path, folder, window or DEFAULT_WINDOW)
    _refuse_window(folder, window)
    if not holds_images(path):
        raise typer.BadParameter(
            f"expected an .npz archive, a folder of image files or NAME-images-idx3-ubyte[.gz], as {folder} is a "
            f"vision model, got {path}",
            param_hint="--calib",
        )
    return Pictures.open(path, config)


def evaluation_data(
    folder: Path, text: Path | None, images: Path | None, window: int | None, limit: int | None
) -> Data:
    """The data of --text or --images.

    Args:
        folder: of the model, whose kind decides which it must be.
        text: of --text, or None.
        images: of --images, or None.
        window: of --window, or None.
        limit: keep only so many pieces from the start; None for all.

    Raises:
        typer.BadParameter: the other kind of data, both or none, or windows for images.
        ValueError: a model folder or data that cannot be read, or images without labels.
    """
    config = vision_config(folder)
    if config is None:
        if text is None or images is not None:
            raise typer.BadParameter(
                f"expected --text alone: {folder} is a language model", param_hint="--text"
            )
        return Text.open(text, folder, window or DEFAULT_WINDOW, limit)
    _refuse_window(folder, window)
    if images is None or text is not None:
        raise typer.BadParameter(
            f"expected --images alone: {folder} is a vision model", param_hint="--images"
        )
    return Pictures.open_labelled(images, config, limit)


def check_float_model(against: Path, model: Path) -> None:
    """The folders of --float and of the model to set beside it.

    Raises:
        typer.BadParameter: two float models, or a language model beside a vision model.
        ValueError: a model folder that cannot be read.
    """
    if not is_quantized(model):
        raise typer.BadParameter(
            f"expected a quantized model to set beside it, got {model}", param_hint="--float"
        )
    kinds = [vision_config(folder) is None for folder in (against, model)]
    if kinds[0] != kinds[1]:
        other, own = ("language", "vision") if kinds[0] else ("vision", "language")
        raise typer.BadParameter(
            f"expected a {own} model as {model} is, got the {other} model {against}",
            param_hint="--float",
        )


def _refuse_window(folder: Path, window: int | None) -> None:
    if window is not None:
        raise typer.BadParameter(
            f"images have no windows of tokens: {folder} is a vision model", param_hint="--window"
        )
