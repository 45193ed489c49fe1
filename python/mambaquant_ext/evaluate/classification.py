"""Accuracy of an image classifier, and how often two classifiers say the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Classification:
    """Result of `classify`.

    Attributes:
        predictions: (count,), int64: the class of the largest logit, the first of equals; on the CPU.
        correct: how many of them are the labels.
        images_per_second: images read per second of forward passes.
    """

    predictions: Tensor
    correct: int
    images_per_second: float

    @property
    def images(self) -> int:
        """How many images."""
        return len(self.predictions)

    @property
    def top1(self) -> float:
        """Share of images whose prediction is the label, 0 to 1."""
        return self.correct / self.images

    def to_dict(self) -> dict[str, Any]:
        """The figures without the predictions, ready for JSON."""
        return {
            "top1": self.top1,
            "correct": self.correct,
            "images": self.images,
            "images_per_second": self.images_per_second,
        }


@torch.no_grad()
def classify(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    batch_size: int = 64,
    prepare: Callable[[Tensor], Tensor] = lambda batch: batch,
    progress: Callable[[int], None] = lambda _done: None,
) -> Classification:
    """Classifies images and compares with their labels.

    Args:
        logits: (batch, channels, height, width), as `prepare` returns them -> (batch, classes).
        images: (count, channels, height, width), of any dtype that `prepare` takes.
        labels: (count,), integers from 0 to classes - 1.
        batch_size: images per forward pass.
        prepare: makes the input of `logits` from a batch of images, outside the timed span; say, normalises bytes,
            which as floats would take four times the memory all at once.
        progress: called with the number of images done.

    Returns:
        Predictions and figures.

    Raises:
        ValueError: no images, another number of labels, labels that are no classes, a batch size below 1, or
            logits of another shape or with NaN, which would pass for a class.
    """
    _check(images, labels, batch_size)
    labels = labels.cpu()
    predictions = torch.empty(len(images), dtype=torch.int64)
    seconds = 0.0
    for start in range(0, len(images), batch_size):
        span = slice(start, start + batch_size)
        batch = prepare(images[span])
        begin = time.perf_counter()
        # To the CPU within the timed span: a GPU is still computing when the call returns.
        scores = logits(batch).cpu()
        seconds += time.perf_counter() - begin
        _check_logits(scores, labels[span])
        predictions[span] = scores.argmax(1)
        progress(start + len(batch))
    return Classification(
        predictions=predictions,
        correct=int((predictions == labels).sum()),
        images_per_second=len(images) / seconds,
    )


def agreement(a: Classification, b: Classification) -> float:
    """Share of images for which two models predict the same class, right or wrong; 0 to 1.

    Args:
        a: of one model.
        b: of another on the same images.

    Raises:
        ValueError: not as many images.
    """
    if a.images != b.images:
        raise ValueError(f"expected predictions for as many images, got {a.images} and {b.images}")
    return int((a.predictions == b.predictions).sum()) / a.images


def _check(images: Tensor, labels: Tensor, batch_size: int) -> None:
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(
            "images: expected (count, channels, height, width) and at least one, got shape "
            f"{tuple(images.shape)}"
        )
    if labels.shape != (len(images),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels: expected integers of shape ({len(images)},), one an image, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")


def _check_logits(scores: Tensor, labels: Tensor) -> None:
    if scores.dim() != 2 or len(scores) != len(labels) or scores.shape[1] == 0:
        raise ValueError(
            f"logits: expected shape ({len(labels)}, classes), got {tuple(scores.shape)}"
        )
    if bool(scores.isnan().any()):
        raise ValueError("logits: expected numbers, got NaN")
    strange = labels[(labels < 0) | (labels >= scores.shape[1])]
    if len(strange):
        raise ValueError(
            f"labels: expected 0 to {scores.shape[1] - 1}, the model's classes, got {int(strange[0])}"
        )
