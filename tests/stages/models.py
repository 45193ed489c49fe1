"""Small random Mamba language models whose channels differ in size as those of real ones do, or more."""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch

from mambaquant_ext.model import (
    FORWARD,
    BranchWeights,
    ConvWeights,
    LanguageModelWeights,
    Merge,
    MixerWeights,
    NormKind,
    NormWeights,
    ScanRoute,
    Skip,
)
from reference import mamba as reference


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model."""

    name: str
    hidden: int = 48
    dim: int = 96
    dstate: int = 16
    dt_rank: int = 12
    width: int = 4
    layers: int = 2
    vocab: int = 37


REAL = Geometry("twelve-times-a-power-of-two")  # as 130m: 768, 1536, 16, 48
POWER_OF_TWO = Geometry("power-of-two", hidden=32, dim=64, dt_rank=4)
# No Hadamard matrix of these orders is symmetric, so that every transpose is seen.
ASYMMETRIC = Geometry(
    "asymmetric-matrices", hidden=28, dim=56, dstate=12, dt_rank=12, width=3, layers=3
)
GEOMETRIES = (REAL, POWER_OF_TWO, ASYMMETRIC)


def spread(generator, count, sigma=1.0):
    """(count,), log-normal factors."""
    return torch.exp(sigma * torch.randn(count, generator=generator, dtype=torch.float64))


def mixer_weights(sizes, generator):
    """One block: random weights with log-normal rows, columns and norm; every bias non-zero."""

    def normal(*shape, gain=1.0):
        return gain * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def linear(rows, columns):
        return normal(rows, columns, gain=columns**-0.5) * spread(generator, rows, 0.7)[:, None]

    hidden, dim, dstate = sizes.hidden, sizes.dim, sizes.dstate
    delta = torch.rand(dim, generator=generator, dtype=torch.float64) * 0.3 + 1e-3
    rates = torch.arange(1, dstate + 1, dtype=torch.float64)
    norm = NormWeights(
        kind=NormKind.RMS,
        weight=spread(generator, hidden, 0.8),
        bias=torch.zeros(hidden, dtype=torch.float64),
        eps=1e-5,
    )
    in_x, in_z = linear(dim, hidden), linear(dim, hidden)
    in_x_bias, in_z_bias = normal(dim, gain=0.1), normal(dim, gain=0.1)
    conv = ConvWeights(weight=normal(dim, sizes.width, gain=0.5), bias=normal(dim, gain=0.2))
    branch = BranchWeights(
        x_dt=0.3 * linear(sizes.dt_rank, dim),
        x_dt_bias=normal(sizes.dt_rank, gain=0.2),
        x_B=0.2 * linear(dstate, dim),
        x_C=0.2 * linear(dstate, dim),
        dt=linear(dim, sizes.dt_rank),
        dt_bias=torch.log(torch.expm1(delta)),
        A=-rates * spread(generator, dim, 0.2)[:, None],
        D=spread(generator, dim, 0.3),
    )
    return MixerWeights(
        norm=norm,
        in_x=in_x,
        in_z=in_z,
        in_x_bias=in_x_bias,
        in_z_bias=in_z_bias,
        convs=(conv,),
        branches=(branch,),
        out=linear(hidden, dim) * spread(generator, dim, 0.7),
        out_bias=normal(hidden, gain=0.1),
        gate_scale=torch.ones(dim, dtype=torch.float64),
    )


def many_parts(generator, merge=Merge.GATED):
    """A block of two convolutions and two branches, with every part that may be absent and that its merge allows.

    (batch, tokens, 16) in and out; with Merge.GATED no norm and no excitation behind the scans.
    """
    sizes = Geometry("", hidden=16, dim=24, dstate=4, dt_rank=2, width=3)
    first, second = (mixer_weights(sizes, generator).to(torch.float32) for _ in range(2))

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    ends = {"merge_gate": normal(2, 2, 24)}
    if merge is not Merge.GATED:
        weight, bias = torch.rand(24, generator=generator) + 0.5, normal(24)
        ends = {
            "out_norm": NormWeights(kind=NormKind.LAYER, weight=weight, bias=bias, eps=1e-5),
            "squeeze": normal(3, 24),
            "excite": normal(24, 3),
        }
    return first.replace(
        convs=(*first.convs, *second.convs),
        branches=(*first.branches, second.branches[0].replace(conv=1)),
        routes=(FORWARD, ScanRoute(reverse=True, branch=1)),
        merge=merge,
        skip=Skip.NORMALISED,
        skip_weight=normal(16),
        skip_bias=normal(16),
        class_token=4,
        **ends,
    )


def flat(layer):
    """A block of one norm, convolution and branch with all its tensors side by side, as the reference reads it."""
    (conv,), (branch,) = layer.convs, layer.branches
    names = (
        *("in_x", "in_z", "in_x_bias", "in_z_bias", "out", "out_bias", "gate_scale"),
        *("has_in_rotation", "has_out_rotation", "has_state_rotation"),
    )
    parts = ("x_dt", "x_dt_bias", "x_B", "x_C", "dt", "dt_bias", "A", "D")
    return SimpleNamespace(
        norm_weight=layer.norm.weight,
        norm_eps=layer.norm.eps,
        conv=conv.weight,
        conv_bias=conv.bias,
        **{name: getattr(branch, name) for name in parts},
        **{name: getattr(layer, name) for name in names},
    )


def on_branch(transform):
    """A transform of a branch as one of a block: the same arguments behind the block."""

    def on_block(layer, *arguments):
        (branch,) = layer.branches
        return layer.replace(branches=(transform(branch, *arguments),))

    return on_block


def reference_mixer(layer, tokens, initial_state=None):
    """reference.mixer of a block, which must be one that the reference knows."""
    assert layer.is_sequential
    assert layer.norm.kind is NormKind.RMS
    assert not layer.norm.bias.any()
    assert layer.out_norm is None
    return reference.mixer(flat(layer), tokens, initial_state)


def reference_logits(weights, ids):
    """reference.language_model of a model: logits, and residuals at every layer."""
    return reference.language_model(
        SimpleNamespace(
            embedding=weights.embedding,
            layers=tuple(flat(layer) for layer in weights.layers),
            norm_f=weights.norm_f,
            norm_eps=weights.norm_eps,
            lm_head=weights.lm_head,
        ),
        ids,
    )


@cache
def model(sizes, seed=1):
    """A float64 model, the same for the same arguments. Its values are float32 values."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(sizes.vocab, sizes.hidden, generator=generator, dtype=torch.float64)
    weights = LanguageModelWeights(
        embedding=embedding * spread(generator, sizes.hidden, 0.8),
        layers=tuple(mixer_weights(sizes, generator) for _ in range(sizes.layers)),
        norm_f=spread(generator, sizes.hidden, 0.8),
        norm_eps=1e-5,
        lm_head=torch.randn(sizes.vocab, sizes.hidden, generator=generator, dtype=torch.float64),
    )
    return weights.to(torch.float32).to(torch.float64)


@cache
def batches(sizes, count=4, seqlen=64, seed=2):
    """Token ids, (2, seqlen) each."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(sizes.vocab, (2, seqlen), generator=generator) for _ in range(count))


@cache
def prompt(sizes):
    """(1, 20) token ids that are not in `batches`."""
    return torch.randint(sizes.vocab, (1, 20), generator=torch.Generator().manual_seed(3))


@cache
def reference_outputs(sizes, seed=1):
    """Logits and residuals of `model` on `prompt`, by the reference."""
    return reference_logits(model(sizes, seed), prompt(sizes)[0].tolist())
