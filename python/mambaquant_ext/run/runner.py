"""A quantized language model as one native call a step: embedding, every block, norm and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambaquant_ext.model.hf import embedding_name
from mambaquant_ext.run.block import QuantMambaBlock
from mambaquant_ext.run.mixers import IntegerMixer
from mambaquant_ext.run.modules import FinalNorm, QuantEmbedding, QuantLinear
from mambaquant_ext.run.native import NativeBlocks
from mambaquant_ext.run.swap import QuantMambaSsmBlock


@dataclass(frozen=True, slots=True, eq=False)
class RunnerState:
    """What a language model keeps between tokens: the same size whatever it has read.

    Attributes:
        conv: (blocks, batch, width - 1, dim), int8, the last inputs of each convolution.
        ssm: (blocks, batch, dstate, dim), float32.
    """

    conv: Tensor
    ssm: Tensor

    @property
    def batch(self) -> int:
        """How many sequences."""
        return self.conv.shape[1]

    @torch.inference_mode()  # whose tensors may be changed nowhere else
    def reset(self) -> None:
        """Back to the start of a sequence, in place."""
        self.conv.zero_()
        self.ssm.zero_()

    def copy(self) -> RunnerState:
        """Another state of the same values: two sequences may go on from it."""
        return RunnerState(self.conv.clone(), self.ssm.clone())


class LanguageRunner:
    """Reads tokens with a quantized language model on the CPU, in one native call whatever their number.

    The residual stream has the bits that the model's own modules give. Memory does not grow with the prompt: the
    activations are those of some hundred tokens. A step of one token allocates nothing but what it returns.
    Calls from several threads run one after another.
    """

    def __init__(self, model: nn.Module) -> None:
        """Takes the packed tensors of a model, without copying them.

        Args:
            model: a language model from `quantize_` or `load`, of transformers or mamba_ssm, with
                Fidelity.INTEGER, on the CPU.

        Raises:
            ValueError: another kind of model; the message names the first part that does not fit.
        """
        parts = _Parts(model)
        self.vocab_size, self.hidden = parts.embedding.weight.shape
        self._norm, self._head = parts.norm, parts.head
        self.has_int8_head = parts.head.packed is not None
        self.blocks = NativeBlocks(parts.mixers, parts.embedding, parts.norm, parts.head)

    def new_state(self, batch: int = 1) -> RunnerState:
        """The state at the start of a sequence.

        Args:
            batch: how many sequences.

        Raises:
            ValueError: fewer than one.
        """
        if batch < 1:
            raise ValueError(f"LanguageRunner: expected a batch of at least 1, got {batch}")
        mixers = self.blocks.mixers
        conv, ssm = mixers[0].state_shapes(batch)
        return RunnerState(
            torch.zeros(len(mixers), *conv, dtype=torch.int8, device="cpu"),
            torch.zeros(len(mixers), *ssm, dtype=torch.float32, device="cpu"),
        )

    def forward(self, ids: Tensor, state: RunnerState, out: Tensor | None = None) -> Tensor:
        """Reads tokens and says what may come next.

        Args:
            ids: (batch, seqlen), int64, the next tokens of each sequence.
            state: of the tokens before; advanced in place.
            out: (batch, vocab), float32, to write into, or None for a new tensor.

        Returns:
            (batch, vocab), float32: the logits behind the last token; `out` if given.

        Raises:
            ValueError: shapes that do not fit each other or the model.
            TypeError: other dtypes.
            IndexError: an id outside the vocabulary.
            NotImplementedError: another instruction set was forced since the model was made.
        """
        if ids.dtype != torch.int64:
            raise TypeError(f"LanguageRunner: expected ids of dtype torch.int64, got {ids.dtype}")
        shape = (*ids.shape[:1], self.vocab_size)
        if out is None:
            out = ids.new_empty(shape, dtype=torch.float32)
        if self.has_int8_head:
            self.blocks.forward(ids, state.conv, state.ssm, logits=out)
            return out
        if out.shape != shape:
            raise ValueError(
                f"LanguageRunner: expected out of shape (batch, vocab) = {shape}, got {tuple(out.shape)}"
            )
        if out.dtype != torch.float32:
            raise TypeError(f"LanguageRunner: expected out of dtype float32, got {out.dtype}")
        last = ids.new_empty((*ids.shape[:1], self.hidden), dtype=torch.float32)
        self.blocks.forward(ids, state.conv, state.ssm, last=last)
        with torch.inference_mode():
            return out.copy_(self._head(self._norm(last)))


class _Parts:
    """The modules of a quantized language model, checked."""

    def __init__(self, model: nn.Module) -> None:
        backbone: Any = getattr(model, "backbone", None)
        layers = getattr(backbone, "layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise ValueError(
                f"LanguageRunner: expected a language model with backbone.layers, got {type(model).__name__}"
            )
        self.embedding = _expect(
            getattr(backbone, embedding_name(backbone)), QuantEmbedding, "the embedding"
        )
        self.norm = _expect(getattr(backbone, "norm_f", None), FinalNorm, "backbone.norm_f")
        self.head = _expect(getattr(model, "lm_head", None), QuantLinear, "lm_head")
        self.mixers = [_mixer(layer, index) for index, layer in enumerate(layers)]
        for index, mixer in enumerate(self.mixers):
            if mixer.native is None:
                raise ValueError(
                    f"LanguageRunner: expected blocks of a language model, got another structure in block {index}"
                )
            if mixer.layout != self.mixers[0].layout:
                raise ValueError(
                    f"LanguageRunner: expected blocks of one layout, got another in block {index}"
                )
        if self.embedding.weight.device.type != "cpu":
            raise ValueError(
                f"LanguageRunner: expected a model on the CPU, got one on {self.embedding.weight.device}"
            )


def _expect(module: Any, kind: type, name: str) -> Any:
    if not isinstance(module, kind):
        raise ValueError(
            f"LanguageRunner: expected {name} to be a {kind.__name__}, got {type(module).__name__}; "
            "quantize the model first"
        )
    return module


def _mixer(layer: nn.Module, index: int) -> IntegerMixer:
    block = layer.block if isinstance(layer, QuantMambaSsmBlock) else layer
    executor = _expect(block, QuantMambaBlock, f"block {index}").executor
    if not isinstance(executor, IntegerMixer):
        raise ValueError(
            f"LanguageRunner: expected Fidelity.INTEGER in block {index}, got an emulated block"
        )
    return executor
