"""What calibration runs: a model whose blocks can be looked into, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mambaquant_ext.model import LanguageModelWeights, MixerWeights, language_model_forward
from mambaquant_ext.model.forward import Tap
from mambaquant_ext.model.sites import BlockSite, FloatBlock, TokenSequence

Taps = Callable[[int], Tap]


class CalibrationRun(Protocol):
    """A model that calibration can run and look into.

    Attributes:
        layers: its blocks, in the order of `taps`.
    """

    layers: Sequence[MixerWeights]

    def run(self, batch: Any, taps: Taps, head_tap: Tap) -> None:
        """One forward pass.

        Args:
            batch: of calibration data.
            taps: the tap of each block.
            head_tap: sees site "head", the input of a head that becomes int8.
        """


def token_ids(batch: Any) -> Tensor:
    """The token ids of a batch.

    Args:
        batch: (batch, seqlen) or (seqlen,) integer tensor, or a mapping with such a tensor as "input_ids" and
            no padding in "attention_mask": statistics are over all tokens.

    Returns:
        (batch, seqlen), int64.

    Raises:
        ValueError: another shape, no tokens, a mapping without "input_ids", or padding.
        TypeError: another type or dtype.
    """
    ids = batch
    if hasattr(batch, "keys"):
        if "input_ids" not in batch:
            raise ValueError(
                f"calibration batch: expected a mapping with input_ids, got {', '.join(map(str, batch.keys()))}"
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if isinstance(mask, Tensor) and not bool(mask.all()):
            padding = int((mask == 0).sum())
            raise ValueError(
                f"calibration batch: expected no padding, got attention_mask with {padding} zero(s)"
            )
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"calibration batch: expected a tensor of token ids, got {type(ids).__name__}"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"calibration batch: expected integer token ids, got {ids.dtype}")
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"calibration batch: expected shape (batch, seqlen), got {tuple(ids.shape)}"
        )
    return ids.long()


class LanguageRun:
    """A language model on token ids."""

    def __init__(self, model: LanguageModelWeights) -> None:
        """Takes float32 weights."""
        self.model = model
        self.layers: Sequence[MixerWeights] = model.layers

    def run(self, batch: Any, taps: Taps, head_tap: Tap) -> None:
        """See CalibrationRun.

        Raises:
            ValueError: ids outside the vocabulary.
        """
        ids = token_ids(batch)
        vocab = self.model.embedding.shape[0]
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"calibration batch: expected token ids from 0 to {vocab - 1}, got {low} to {high}"
            )
        language_model_forward(self.model, ids, taps, head_tap)


class BlockRun:
    """One block on tensors (batch, seqlen, hidden)."""

    def __init__(self, layer: MixerWeights) -> None:
        """Takes float32 weights."""
        self.layers: Sequence[MixerWeights] = (layer,)
        self._block = FloatBlock(layer, TokenSequence())

    def run(self, batch: Any, taps: Taps, head_tap: Tap) -> None:
        """See CalibrationRun."""
        self._block.tap = taps(0)
        self._block(batch.float())


class ModuleRun:
    """Any module, its Mamba blocks replaced by float stand-ins."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[BlockSite],
        layers: Sequence[MixerWeights],
        head: str | None,
    ) -> None:
        """Puts the stand-ins into the model.

        Args:
            model: float; changed in place, a copy of the user's.
            sites: of its blocks.
            layers: weights of the stand-ins, one a site.
            head: name of the linear layer whose input head_tap sees, or None.
        """
        self.layers = layers
        self._blocks = [
            FloatBlock(layer, site.contract) for layer, site in zip(layers, sites, strict=True)
        ]
        self.model = model.eval()
        for site, block in zip(sites, self._blocks, strict=True):
            site.replace_in(self.model, block)
        self._head = None if head is None else self.model.get_submodule(head)

    @torch.no_grad()
    def run(self, batch: Any, taps: Taps, head_tap: Tap) -> None:
        """See CalibrationRun.

        Args:
            batch: a tensor, given to the model as it is; a mapping, given as keyword arguments; or a sequence.
            taps: the tap of each block.
            head_tap: sees the head's input.
        """
        for index, block in enumerate(self._blocks):
            block.tap = taps(index)
        hook = None
        if self._head is not None:
            hook = self._head.register_forward_pre_hook(
                lambda _module, args: (head_tap("head", args[0]), None)[1]
            )
        try:
            call(self.model, batch)
        finally:
            if hook is not None:
                hook.remove()


def call(model: nn.Module, batch: Any) -> Any:
    """model(batch), model(**batch) or model(*batch), by what the batch is.

    Args:
        model: to call.
        batch: a tensor, a mapping, or a tuple or list.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)
