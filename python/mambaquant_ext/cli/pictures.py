"""Images as a vision model takes them, with labels in the order of its classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mambaquant_ext.cli.sampling import pick
from mambaquant_ext.evaluate import Classification, agreement, classify
from mambaquant_ext.images import ImageSet, load_images, normalise

# What a model's configuration says of its images and classes.
CONFIG_FIELDS = ("input_size", "channels", "mean", "std", "num_classes", "class_names")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pictures:
    """See mambaquant_ext.cli.data.Data.

    Attributes:
        path: where from.
        images: of the model's size and channels.
    """

    unit: ClassVar[str] = "image"
    path: Path
    images: ImageSet

    @classmethod
    def open(cls, path: Path, config: Any) -> Pictures:
        """Reads images; their labels are as the source numbers them.

        Args:
            path: see load_images.
            config: of the model.

        Raises:
            ValueError: images that cannot be read or have another size, or a model that says too little of its input.
        """
        missing = [name for name in CONFIG_FIELDS if not hasattr(config, name)]
        if missing:
            raise ValueError(
                f"{type(config).__name__}: expected a classifier of images, got no {', '.join(missing)}"
            )
        return cls(path=path, images=load_images(path, config.input_size, config.channels))

    @classmethod
    def open_labelled(cls, path: Path, config: Any, limit: int | None) -> Pictures:
        """Reads images with labels in the order of the model's classes.

        Args:
            path: see load_images.
            config: of the model.
            limit: keep only so many from the start; None for all.

        Raises:
            ValueError: as `open`, or no labels, or labels that are not the model's classes.
        """
        pictures = cls.open(path, config)
        labels = _model_labels(pictures.images, config, path)
        return replace(pictures, images=replace(pictures.images, labels=labels)[:limit])

    def __len__(self) -> int:
        """How many images."""
        return len(self.images)

    @property
    def title(self) -> str:
        """See Data."""
        return f"{self.path.name}, {self.pieces(len(self))}"

    def pieces(self, count: int) -> str:
        """See Data."""
        return f"{count} images"

    def batches(self, model: Any, count: int, size: int, seed: int) -> list[Tensor]:
        """See Data."""
        chosen = pick(self.images.images, count, seed)
        return [normalise(b, model.config.mean, model.config.std) for b in chosen.split(size)]

    def score(self, model: Any, batch: int, progress: Callable[[int], None]) -> Classification:
        """See Data."""
        assert self.images.labels is not None
        mean, std = model.config.mean, model.config.std
        return classify(
            model,
            self.images.images,
            self.images.labels,
            batch,
            lambda images: normalise(images, mean, std),
            progress,
        )

    def figures(self, score: Classification, reference: Classification | None) -> dict[str, Any]:
        """See Data."""
        if reference is None:
            return score.to_dict()
        share = agreement(score, reference)
        return {**score.to_dict(), "agreement": share, "agreeing": round(share * score.images)}

    def cells(self, figures: dict[str, Any]) -> dict[str, str]:
        """See Data."""
        share = figures.get("agreement")
        return {
            "top-1": f"{figures['top1']:.2%}",
            "correct": f"{figures['correct']} / {figures['images']}",
            "agrees with float": "" if share is None else f"{share:.2%}",
            "images/s": f"{figures['images_per_second']:,.0f}",
        }


def _model_labels(images: ImageSet, config: Any, path: Path) -> Tensor:
    """Labels in the order of the model's classes."""
    labels = images.labels
    if labels is None:
        raise ValueError(f"{path}: expected images with labels, got none to compare with")
    classes = _classes_of_folders(images.class_names, config, path)
    highest = max(classes, default=int(labels.max()))
    if highest >= config.num_classes:
        raise ValueError(
            f"{path}: expected labels from 0 to {config.num_classes - 1}, the model's classes, got {highest}"
        )
    return torch.tensor(classes)[labels] if classes else labels


def _classes_of_folders(folders: tuple[str, ...], config: Any, path: Path) -> list[int]:
    """The class of each subfolder: by its name, by its number, or by its place among them.

    The last is how ImageNet is laid out; it takes a subfolder for every class.
    """
    known = {name: number for number, name in enumerate(config.class_names)}
    strange = [name for name in folders if name not in known]
    if len(strange) < len(folders):
        if strange:
            raise ValueError(f"{path / strange[0]}: expected one of {', '.join(known)}")
        return [known[name] for name in folders]
    if all(name.isdecimal() for name in folders):
        return [int(name) for name in folders]
    if len(folders) != config.num_classes:
        raise ValueError(
            f"{path}: expected subfolders named or numbered as the model's classes, or one for each of the "
            f"{config.num_classes}, got {len(folders)}"
        )
    return list(range(len(folders)))
