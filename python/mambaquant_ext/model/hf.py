"""transformers' MambaForCausalLM as plain weights, and back into a skeleton for quantized modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambaquant_ext.artifacts.layout import NormKind
from mambaquant_ext.model.reading import copied, copied_or_zeros, read_branch, read_conv
from mambaquant_ext.model.weights import (
    LanguageModelWeights,
    MixerWeights,
    NormWeights,
)

# What mamba_ssm's Mamba and transformers' MambaMixer are made of.
MIXER_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")


def import_transformers() -> Any:
    """The transformers package.

    Raises:
        ImportError: it is not installed; names the extra that brings it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "this needs the transformers library: pip install 'mambaquant_ext[hf]'"
        ) from error
    return transformers


@contextmanager
def refusals_as(kind: type[ValueError], path: Path) -> Iterator[None]:
    """Turns whatever transformers raises on a file's values into one error that names the file.

    Its parts raise errors of many types on a bad value: KeyError, AttributeError, RuntimeError and their own.

    Args:
        kind: of the error to raise.
        path: of the file.

    Raises:
        ValueError: of that kind, for any exception inside the with-block.
    """
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        raise kind(f"{path}: refused by transformers: {type(error).__name__}: {text}") from None


def mixer_weights(mixer: nn.Module, norm: NormWeights | None) -> MixerWeights:
    """The weights of a Mamba-1 mixer of transformers or mamba_ssm: their parameters have the same names.

    Args:
        mixer: with in_proj, conv1d, x_proj, dt_proj, A_log, D, out_proj.
        norm: before it, or None.

    Returns:
        float32 weights; nothing shares storage with the module.

    Raises:
        TypeError: a module without those parts, or with parts of another kind.
        ValueError: an activation other than SiLU.
    """
    missing = [name for name in MIXER_PARTS if not hasattr(mixer, name)]
    if missing:
        raise TypeError(
            f"expected a Mamba-1 mixer with {', '.join(MIXER_PARTS)}, got {type(mixer).__name__} without "
            f"{', '.join(missing)}"
        )
    activation = getattr(mixer, "activation", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"{type(mixer).__name__}: expected activation silu, got {activation!r}")
    m: Any = mixer
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        part = getattr(m, name)
        if not isinstance(part, nn.Linear) or not part.weight.is_floating_point():
            raise TypeError(
                f"{type(mixer).__name__}.{name}: expected a float nn.Linear, got {type(part).__name__}"
            )

    dim = m.dt_proj.weight.shape[0]
    in_x, in_z = copied(m.in_proj.weight).split(dim)
    in_x_bias, in_z_bias = copied_or_zeros(m.in_proj.bias, 2 * dim).split(dim)
    return MixerWeights(
        norm=norm,
        in_x=in_x,
        in_x_bias=in_x_bias,
        in_z=in_z,
        in_z_bias=in_z_bias,
        convs=(read_conv(m.conv1d),),
        branches=(read_branch(m.x_proj, m.dt_proj, m.A_log, m.D),),
        out=copied(m.out_proj.weight),
        out_bias=copied_or_zeros(m.out_proj.bias, m.out_proj.weight.shape[0]),
        gate_scale=torch.ones(dim),
    )


def norm_parts(norm: nn.Module, owner: str) -> tuple[Tensor, float]:
    """Weight and eps of an RMSNorm of transformers, mamba_ssm or torch.

    Args:
        norm: the module.
        owner: its name, for the error.

    Returns:
        weight: (hidden,).
        eps: added to the mean square.

    Raises:
        TypeError: not an RMSNorm with a weight and no bias.
    """
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    is_rms = "rms" in type(norm).__name__.lower()
    if weight is None or eps is None or getattr(norm, "bias", None) is not None or not is_rms:
        raise TypeError(f"{owner}: expected an RMSNorm with a weight, got {type(norm).__name__}")
    return weight, float(eps)


def block_weights(block: nn.Module) -> MixerWeights:
    """The weights of a block with `norm` and `mixer`.

    Raises:
        TypeError: a block of another kind.
        ValueError: an activation other than SiLU.
    """
    if not hasattr(block, "norm") or not hasattr(block, "mixer"):
        raise TypeError(f"expected a Mamba block with norm and mixer, got {type(block).__name__}")
    owner = type(block).__name__
    if getattr(block, "mlp", None) is not None:
        raise TypeError(f"{owner}: expected a block without an mlp, got {type(block.mlp).__name__}")
    assert isinstance(block.norm, nn.Module) and isinstance(block.mixer, nn.Module)
    weight, eps = norm_parts(block.norm, f"{owner}.norm")
    weight = copied(weight)
    norm = NormWeights(kind=NormKind.RMS, weight=weight, bias=torch.zeros_like(weight), eps=eps)
    return mixer_weights(block.mixer, norm)


def embedding_name(backbone: nn.Module) -> str:
    """Name of the embedding in transformers' (`embeddings`) or mamba_ssm's (`embedding`) backbone."""
    return "embeddings" if hasattr(backbone, "embeddings") else "embedding"


def is_language_model(model: nn.Module) -> bool:
    """Whether language_model_weights is the one to read it, or to say what is wrong with it.

    Args:
        model: any.
    """
    return hasattr(model, "backbone") and hasattr(model, "lm_head")


def language_model_weights(model: nn.Module) -> LanguageModelWeights:
    """The weights of a MambaForCausalLM of transformers, or a MambaLMHeadModel of mamba_ssm.

    Args:
        model: with `backbone` (embeddings, layers, norm_f) and `lm_head`.

    Returns:
        float32 weights; nothing shares storage with the model.

    Raises:
        TypeError: a model or block of another kind.
    """
    backbone, lm_head = getattr(model, "backbone", None), getattr(model, "lm_head", None)
    parts = ("layers", "norm_f")
    if backbone is None or lm_head is None or any(not hasattr(backbone, name) for name in parts):
        raise TypeError(
            "expected a Mamba language model with backbone.layers, backbone.norm_f and lm_head "
            f"(transformers.MambaForCausalLM), got {type(model).__name__}"
        )
    for module in (lm_head, getattr(backbone, embedding_name(backbone), None)):
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            raise TypeError(
                f"{type(model).__name__}: expected a float model, got {type(module).__name__} at its ends; "
                "is it quantized already?"
            )
    norm_f, eps = norm_parts(backbone.norm_f, "backbone.norm_f")
    embedding = getattr(backbone, embedding_name(backbone)).weight
    return LanguageModelWeights(
        embedding=copied(embedding),
        layers=tuple(block_weights(block) for block in backbone.layers),
        norm_f=copied(norm_f),
        norm_eps=eps,
        lm_head=copied(lm_head.weight),
    )
