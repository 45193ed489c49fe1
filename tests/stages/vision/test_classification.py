"""Accuracy and agreement against counts by hand, and what the timed span holds."""

import json
import time

import pytest
import torch

from mambaquant_ext.evaluate import Classification, agreement, classify
from mambaquant_ext.images import normalise

CLASSES = 4


def one_hot(images):
    """Logits of a classifier that reads the class off the first pixel."""
    return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), CLASSES).float()


def images_of(classes):
    images = torch.zeros(len(classes), 1, 2, 2)
    images[:, 0, 0, 0] = torch.tensor(classes, dtype=torch.float32)
    return images


PREDICTED = [0, 1, 2, 3, 2, 1, 0]
LABELS = torch.tensor([0, 1, 2, 0, 0, 1, 3])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_counts(batch_size, dtype):
    sizes, done = [], []

    def logits(batch):
        assert not torch.is_grad_enabled()
        sizes.append(len(batch))
        return one_hot(batch)

    result = classify(
        logits, images_of(PREDICTED), LABELS.to(dtype), batch_size, progress=done.append
    )
    assert result.predictions.tolist() == PREDICTED
    assert result.predictions.dtype == torch.int64
    assert (result.correct, result.images) == (4, 7)
    assert result.top1 == 4 / 7
    assert max(sizes) == min(batch_size, 7)
    assert sum(sizes) == 7
    assert done == list(torch.tensor(sizes).cumsum(0))


def test_the_first_of_equal_logits_is_predicted():
    result = classify(lambda batch: torch.zeros(len(batch), CLASSES), images_of(PREDICTED), LABELS)
    assert result.predictions.tolist() == [0] * 7


def test_batches_are_prepared_one_at_a_time():
    images = torch.randint(256, (5, 1, 2, 2), dtype=torch.uint8)
    whole = normalise(images, [0.5], [0.25])
    seen = []

    def logits(batch):
        seen.append(batch)
        return torch.zeros(len(batch), CLASSES)

    classify(logits, images, LABELS[:5], 2, prepare=lambda batch: normalise(batch, [0.5], [0.25]))
    assert [len(batch) for batch in seen] == [2, 2, 1]
    assert torch.equal(torch.cat(seen), whole)


def test_only_forward_passes_are_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def taking(seconds, function):
        def run(argument):
            clock[0] += seconds
            return function(argument)

        return run

    result = classify(
        taking(0.5, one_hot),
        images_of(PREDICTED),
        LABELS,
        batch_size=2,
        prepare=taking(100.0, lambda batch: batch),
        progress=taking(100.0, lambda done: None),
    )
    assert result.images_per_second == 7 / (4 * 0.5)


def test_to_dict_is_json_without_tensors():
    result = classify(one_hot, images_of(PREDICTED), LABELS)
    values = json.loads(json.dumps(result.to_dict()))
    speed = result.images_per_second
    assert values == {"top1": 4 / 7, "correct": 4, "images": 7, "images_per_second": speed}


def test_agreement_counts_equal_predictions_right_or_wrong():
    a, b, short = (
        Classification(predictions=torch.tensor(p), correct=0, images_per_second=1.0)
        for p in ([0, 1, 2, 3], [0, 1, 3, 2], [0, 1, 2])
    )
    assert agreement(a, b) == agreement(b, a) == 0.5
    assert agreement(a, a) == 1.0
    with pytest.raises(ValueError, match="as many images, got 4 and 3"):
        agreement(a, short)


def constant(value, *shape):
    return lambda batch: torch.full((len(batch), *shape), value)


IMAGES = images_of(PREDICTED)


@pytest.mark.parametrize(
    ("logits", "images", "labels", "batch_size", "message"),
    [
        (one_hot, IMAGES[:0], LABELS[:0], 8, "images: expected .* at least one"),
        (one_hot, IMAGES[0], LABELS[:1], 8, r"images: .* got shape \(1, 2, 2\)"),
        (one_hot, IMAGES, LABELS[:6], 8, r"labels: expected integers of shape \(7,\)"),
        (one_hot, IMAGES, LABELS[:, None], 8, r"labels: .* got torch.int64 of shape \(7, 1\)"),
        (one_hot, IMAGES, LABELS.float(), 8, "labels: .* got torch.float32"),
        (one_hot, IMAGES, LABELS.bool(), 8, "labels: .* got torch.bool"),
        (one_hot, IMAGES, LABELS - 1, 8, "labels: expected 0 to 3, the model's classes, got -1"),
        (one_hot, IMAGES, LABELS * 2, 8, "labels: expected 0 to 3, the model's classes, got 4"),
        (one_hot, IMAGES, LABELS, 0, "batch_size: expected at least 1, got 0"),
        (constant(0.0), IMAGES, LABELS, 8, r"logits: expected shape \(7, classes\), got \(7,\)"),
        (constant(0.0, 0), IMAGES, LABELS, 8, r"logits: .* got \(7, 0\)"),
        (constant(0.0, 5, 4), IMAGES, LABELS, 8, r"logits: .* got \(7, 5, 4\)"),
        (lambda batch: one_hot(batch)[1:], IMAGES, LABELS, 8, r"logits: .* got \(6, 4\)"),
        (constant(float("nan"), 4), IMAGES, LABELS, 8, "logits: expected numbers, got NaN"),
    ],
)
def test_checks(logits, images, labels, batch_size, message):
    with pytest.raises(ValueError, match=message):
        classify(logits, images, labels, batch_size)
