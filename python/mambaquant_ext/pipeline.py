"""The five stages in a row: calibrate, transform, calibrate again, pack, run."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mambaquant_ext.artifacts import MomentStats, PackedLinear, PackedModel, RangeStats
from mambaquant_ext.calibrate import (
    BlockRun,
    CalibrationRun,
    LanguageRun,
    ModuleRun,
    check_stand_ins,
    collect_moments,
    collect_ranges,
)
from mambaquant_ext.config import Fidelity, Recipe, Rotation
from mambaquant_ext.model import LanguageModelWeights, MixerWeights
from mambaquant_ext.model.adapters import adapter_for
from mambaquant_ext.model.hf import block_weights, is_language_model, language_model_weights
from mambaquant_ext.model.sites import BlockSite
from mambaquant_ext.pack import pack_block, pack_blocks, pack_head, pack_linear
from mambaquant_ext.run import QuantMambaBlock
from mambaquant_ext.run.swap import swap_
from mambaquant_ext.transform import (
    StreamRotation,
    fold_norm,
    needs_folded_norms,
    stream_rotation,
    transform,
    transform_layers,
)

# Called as progress(stage, done, total) after each batch; stage is "moments" or "ranges".
Progress = Callable[[str, int, int], None]
LANGUAGE_MODEL = "mamba-lm"


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """The callback that reports nothing."""


def folded(
    layers: Sequence[MixerWeights], recipe: Recipe, dtype: torch.dtype = torch.float32
) -> tuple[MixerWeights, ...]:
    """Blocks with their norms folded, if the recipe's transforms expect that.

    Args:
        layers: float32.
        recipe: which transforms.
        dtype: of the result.

    Returns:
        Folded in float64.
    """
    if not needs_folded_norms(recipe):
        return tuple(layer.to(dtype) for layer in layers)
    return tuple(fold_norm(layer.to(torch.float64)).to(dtype) for layer in layers)


def provenance_of(batches: Sequence[Any], seed: int | None) -> dict[str, Any]:
    """What a checkpoint tells of its calibration data.

    Args:
        batches: tensors, or mappings or sequences of tensors; other values in them are left out.
        seed: that chose them, if any.

    Returns:
        sha256 over shapes and values, counts, seed.
    """
    digest = hashlib.sha256()
    tensors = [tensor for batch in batches for tensor in _tensors(batch)]
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return {
        "sha256": digest.hexdigest(),
        "batches": len(batches),
        "samples": sum(tensor.shape[0] for tensor in tensors if tensor.dim()),
        "values": sum(tensor.numel() for tensor in tensors),
        "seed": seed,
    }


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    items = batch if isinstance(batch, (list, tuple)) else [batch]
    return [item for item in items if isinstance(item, Tensor)]


class Source(Protocol):
    """A float model as the pipeline sees it: something to run, to transform, and to pack."""

    def check(self, batch: Any) -> None:
        """Refuses a model whose blocks are not understood rightly.

        Args:
            batch: of calibration data.
        """

    def folded_run(self, recipe: Recipe) -> CalibrationRun:
        """The model with its norms folded, if the recipe's transforms expect that."""

    def transformed_run(self, moments: MomentStats, recipe: Recipe) -> CalibrationRun:
        """The equivalent model that the recipe's transforms make.

        Args:
            moments: of the folded model.
            recipe: which transforms.
        """

    def pack(
        self, run: CalibrationRun, ranges: RangeStats, recipe: Recipe, provenance: dict[str, Any]
    ) -> PackedModel:
        """The packed model.

        Args:
            run: from transformed_run.
            ranges: of that run.
            recipe: how.
            provenance: of the calibration data.
        """


class LanguageSource:
    """A language model as plain weights. Batches: see token_ids."""

    def __init__(self, weights: LanguageModelWeights) -> None:
        """Takes float32 weights."""
        self.weights = weights

    def check(self, batch: Any) -> None:
        """See Source: a language model's structure is known, and its parts are checked as they are read."""

    def folded_run(self, recipe: Recipe) -> LanguageRun:
        """See Source."""
        return LanguageRun(self.weights.replace(layers=folded(self.weights.layers, recipe)))

    def transformed_run(self, moments: MomentStats, recipe: Recipe) -> LanguageRun:
        """See Source."""
        return LanguageRun(transform(self.folded_run(recipe).model, moments, recipe))

    def pack(
        self, run: CalibrationRun, ranges: RangeStats, recipe: Recipe, provenance: dict[str, Any]
    ) -> PackedModel:
        """See Source."""
        assert isinstance(run, LanguageRun)
        return PackedModel(
            adapter=LANGUAGE_MODEL,
            names=tuple(f"backbone.layers.{index}" for index in range(len(run.layers))),
            blocks=pack_blocks(run.layers, ranges, recipe),
            head=pack_head(run.model, ranges.head, recipe),
            recipe=recipe,
            provenance=provenance,
        )


class ModuleSource:
    """Any module that an adapter knows.

    A batch is a tensor for model(batch), a mapping for model(**batch), or a sequence for model(*batch).

    Where the adapter can rotate the ends of one residual stream that runs through all blocks, the recipe's
    residual_rotation is folded into them; elsewhere each block rotates its own input online (algorithm section 7.3).
    """

    def __init__(self, model: nn.Module) -> None:
        """Finds the blocks.

        Args:
            model: float32 or float64, on the CPU; it is left alone.

        Raises:
            TypeError: a model that no adapter knows, of another dtype, or a block of another kind.
            ValueError: no blocks, or one that is not supported; names it.
        """
        self.model = model
        self.adapter = adapter_for(model)
        _check_tensors(model)
        self.sites = self.adapter.sites(model)
        if not self.sites:
            raise ValueError(f"quantize: expected Mamba blocks in {type(model).__name__}, got none")
        self.layers = [_read(site) for site in self.sites]

    def check(self, batch: Any) -> None:
        """See Source.

        Raises:
            ValueError: blocks that the adapter describes wrongly.
        """
        layers = [layer.to(torch.float32) for layer in self.layers]
        check_stand_ins(self.model, self.sites, layers, batch, self.adapter.name)

    def folded_run(self, recipe: Recipe) -> ModuleRun:
        """See Source."""
        model = copy.deepcopy(self.model)
        return ModuleRun(model, self.sites, folded(self.layers, recipe), None)

    def transformed_run(
        self, moments: MomentStats, recipe: Recipe, dtype: torch.dtype = torch.float32
    ) -> ModuleRun:
        """See Source.

        Args:
            moments: of the folded model.
            recipe: which transforms.
            dtype: of the result; float64 shows that it is the same function.
        """
        surroundings = copy.deepcopy(self.model).double()
        rotations = self._rotate(surroundings, moments, recipe)
        layers = folded(self.layers, recipe, torch.float64)
        names = [site.name for site in self.sites]
        layers = transform_layers(layers, moments, recipe, rotations, dtype, names)
        head = self.adapter.head if recipe.quantize_head else None
        return ModuleRun(surroundings.to(dtype), self.sites, layers, head)

    def _rotate(
        self, surroundings: nn.Module, moments: MomentStats, recipe: Recipe
    ) -> list[StreamRotation]:
        """R1 of every block; what surrounds the blocks, float64, is rotated in place where the stream is."""
        if recipe.residual_rotation is Rotation.NONE:
            return [StreamRotation()] * len(self.sites)
        if not self.adapter.rotates_stream(surroundings, recipe.residual_rotation):
            return [StreamRotation(is_local=True)] * len(self.sites)
        matrix = stream_rotation(moments, recipe)
        assert matrix is not None
        self.adapter.rotate_ends(surroundings, matrix)
        self.adapter.prepare_rotated(surroundings)
        return [
            StreamRotation(matrix, stream=self.adapter.stream_behind(surroundings, index))
            for index in range(len(self.sites))
        ]

    def pack(
        self, run: CalibrationRun, ranges: RangeStats, recipe: Recipe, provenance: dict[str, Any]
    ) -> PackedModel:
        """See Source."""
        assert isinstance(run, ModuleRun)
        names = tuple(site.name for site in self.sites)
        head = None if ranges.head is None else self.adapter.head
        return PackedModel(
            adapter=self.adapter.name,
            names=names,
            blocks=pack_blocks(run.layers, ranges, recipe),
            surroundings={
                name: tensor.detach().clone()
                for name, tensor in run.model.state_dict().items()
                if head is None or not name.startswith(f"{head}.")
            },
            linear_name=head,
            linear=None if head is None else _packed_linear(run.model, head, ranges, recipe),
            recipe=recipe,
            provenance=provenance,
        )


def _check_tensors(model: nn.Module) -> None:
    """Calibration runs on the CPU, and what surrounds the blocks becomes float32: batches have to fit both."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"quantize: {name}: expected float32, got {parameter.dtype}; call model.float() before"
            )
        if parameter.device.type != "cpu":
            raise ValueError(
                f"quantize: {name}: expected a model on the CPU, got {parameter.device}; call model.cpu() before, and "
                "move the quantized model back"
            )


def _read(site: BlockSite) -> MixerWeights:
    """A block's weights, or an error that names the block."""
    try:
        return site.weights()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{site.name}: {error}") from None


def _packed_linear(model: nn.Module, name: str, ranges: RangeStats, recipe: Recipe) -> PackedLinear:
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear) or ranges.head is None:
        raise TypeError(f"{name}: expected an nn.Linear that runs, got {type(layer).__name__}")
    bias = None if layer.bias is None else layer.bias.detach()
    return pack_linear(layer.weight.detach(), bias, ranges.head, recipe)


def source_of(model: nn.Module) -> LanguageSource | ModuleSource:
    """What the pipeline makes of a model.

    Args:
        model: transformers.MambaForCausalLM, mamba_ssm's MambaLMHeadModel, or any model that an adapter knows.

    Raises:
        TypeError: a model of another kind.
        ValueError: a model without Mamba blocks.
    """
    if is_language_model(model):
        return LanguageSource(language_model_weights(model))
    return ModuleSource(model)


def quantize_source(
    source: Source,
    batches: Iterable[Any],
    recipe: Recipe,
    progress: Progress = no_progress,
    seed: int | None = None,
) -> PackedModel:
    """Calibrates, transforms, calibrates again and packs.

    Args:
        source: the float model.
        batches: to calibrate on. All of them are kept, because there are two passes; activations are held for one
            batch at a time.
        recipe: how.
        progress: called after each batch of each pass.
        seed: recorded with the calibration data.

    Returns:
        The packed model.

    Raises:
        ValueError: no batches, a batch that the model refuses, blocks that the model's adapter describes wrongly,
            activations that are not finite, too few tokens for a KLT, or a width without a Hadamard matrix.
        TypeError: batches of another type.
    """
    kept = list(batches)
    if kept:
        source.check(kept[0])

    def report(stage: str) -> Callable[[int], None]:
        return lambda done: progress(stage, done, len(kept))

    moments = collect_moments(source.folded_run(recipe), kept, report("moments"))
    run = source.transformed_run(moments, recipe)
    ranges = collect_ranges(run, kept, recipe, report("ranges"))
    return source.pack(run, ranges, recipe, provenance_of(kept, seed))


def quantize_(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe,
    fidelity: Fidelity = Fidelity.INTEGER,
    progress: Progress = no_progress,
    seed: int | None = None,
) -> PackedModel:
    """Quantizes a model in place: every Mamba block becomes a QuantMambaBlock, its ends int8 modules.

    The model keeps its class and calling contract, `generate()` included.

    Args:
        model: transformers.MambaForCausalLM, mamba_ssm's MambaLMHeadModel, or any model that an adapter knows (see
            mambaquant_ext.model.adapters), on the CPU.
        batches: to calibrate on: token batches for a language model (tensors (batch, seqlen) or (seqlen,), or
            mappings with "input_ids"); for any other, tensors that it takes, or mappings or sequences of arguments.
        recipe: how, for instance `recipe("w8a8")`.
        fidelity: int8 kernels, or their emulation in float.
        progress: called after each batch of each pass.
        seed: recorded with the calibration data.

    Returns:
        The packed model that now runs inside `model`, for `save`.

    Raises:
        ValueError, TypeError: as `source_of` and `quantize_source`; the model is unchanged then.
    """
    packed = quantize_source(source_of(model), batches, recipe, progress, seed)
    swap_(model, packed, fidelity)
    return packed


def quantize_block(
    block: nn.Module,
    hidden_states: Iterable[Tensor],
    recipe: Recipe,
    fidelity: Fidelity = Fidelity.INTEGER,
) -> QuantMambaBlock:
    """See QuantMambaBlock.from_float."""
    inputs = list(hidden_states)
    layer = block_weights(block)
    for x in inputs:
        if x.dim() != 3 or x.shape[2] != layer.hidden:
            raise ValueError(
                f"quantize_block: expected inputs of shape (batch, seqlen, {layer.hidden}), got {tuple(x.shape)}"
            )
    layers = folded([layer], recipe)
    moments = collect_moments(BlockRun(layers[0]), inputs)
    is_local = recipe.residual_rotation is not Rotation.NONE
    (layer,) = transform_layers(layers, moments, recipe, [StreamRotation(is_local=is_local)])
    ranges = collect_ranges(BlockRun(layer), inputs, recipe)
    packed = pack_block(layer, ranges.layers[0], recipe)
    return QuantMambaBlock(packed, int(getattr(block, "layer_idx", 0) or 0), fidelity)
