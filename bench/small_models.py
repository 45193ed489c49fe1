"""Small random vision models, and how close their transformed and quantized copies stay; the tests take them, too."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambaquant_ext import Fidelity, quantize_
from mambaquant_ext.artifacts import MomentStats, PackedModel
from mambaquant_ext.calibrate import ModuleRun, collect_moments
from mambaquant_ext.config import PRESETS, Recipe
from mambaquant_ext.pipeline import ModuleSource


def uneven_model(model_class: Callable[[Any], nn.Module], config: Any, seed: int = 1) -> nn.Module:
    """A float32 model in eval mode with weights of sensible size, log-normal channels, and no bias of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rpartition(".")[2]
            shape = parameter.shape
            if "A_" in leaf:
                parameter.add_(0.2 * normal(*shape))
            elif leaf in ("D", "D_b", "Ds"):
                parameter.mul_(torch.exp(0.5 * normal(*shape)))
            elif "dt_proj" in name and "bias" in leaf:
                parameter.add_(0.2 * normal(*shape))
            elif "weight" not in leaf:
                # Biases, positions and class tokens.
                parameter.copy_((0.2 if "bias" in leaf else 1.0) * normal(*shape))
            elif parameter.dim() == 1:
                parameter.copy_(torch.exp(0.4 * normal(*shape)))
            else:
                # Weights that are stacked over branches have the name of a parameter, not of a module.
                stacked = int(leaf != "weight")
                rows = shape[: 1 + stacked] + (1,) * (parameter.dim() - 1 - stacked)
                fan_in = shape[1 + stacked :].numel()
                parameter.copy_(
                    0.8 * fan_in**-0.5 * normal(*shape) * torch.exp(0.4 * normal(*rows))
                )
    return model.requires_grad_(False).eval()


def random_batches(shape: Sequence[int], count: int = 2, seed: int = 3) -> list[Tensor]:
    """Normal float32 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def outputs(model: nn.Module, batch: Tensor) -> list[Tensor]:
    """What a model returns, as a list of tensors."""
    with torch.no_grad():
        found = model(batch)
    return [found] if isinstance(found, Tensor) else list(found)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """(values,): all values of some tensors."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def exact(model: nn.Module) -> nn.Module:
    """A float64 copy, with the float32 values of -exp(A_log) that the weights of its blocks have."""
    copied = copy.deepcopy(model).double()
    for name, parameter in copied.named_parameters():
        if "A_" in name.rpartition(".")[2]:
            parameter.copy_(parameter.float().exp().double().log())
    return copied


def transformed(
    model: nn.Module, batches: Sequence[Tensor], recipe: Recipe
) -> tuple[ModuleRun, MomentStats]:
    """The equivalent model that the recipe's transforms make, as a float64 ModuleRun, and the moments it is made of."""
    source = ModuleSource(model)
    moments = collect_moments(source.folded_run(recipe), batches)
    return source.transformed_run(moments, recipe, torch.float64), moments


def error_of(actual_model: nn.Module, expected_model: nn.Module, batch: Tensor) -> float:
    """max |actual - expected| / max |expected| in float64."""
    batch = batch.double()
    actual, expected = flat(outputs(actual_model, batch)), flat(outputs(expected_model, batch))
    return float((actual - expected).abs().max() / expected.abs().max())


def preserved(model: nn.Module, batches: Sequence[Tensor], recipe: Recipe) -> float:
    """Largest relative error that the recipe's transforms make in float64, over the batches."""
    run, _ = transformed(model, batches, recipe)
    float64 = exact(model)
    return max(error_of(run.model, float64, batch) for batch in batches)


def quantized(
    model: nn.Module,
    batches: Sequence[Tensor],
    recipe: Recipe = PRESETS["w8a8"],
    fidelity: Fidelity = Fidelity.INTEGER,
) -> tuple[nn.Module, PackedModel]:
    """A quantized copy, and the packed model in it."""
    model = copy.deepcopy(model)
    packed = quantize_(model, batches, recipe, fidelity)
    return model, packed


def sqnr_db(actual: Tensor, expected: Tensor) -> float:
    """Signal to quantization noise; inf where they are equal."""
    noise = float((actual.double() - expected.double()).norm())
    return 20 * math.log10(float(expected.double().norm()) / noise) if noise else math.inf
