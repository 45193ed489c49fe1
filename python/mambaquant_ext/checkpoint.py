"""Saving a quantized model as a folder, and loading it as a model that runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from mambaquant_ext._load import built_isas, current_isa, forced_isa, gemm_packing
from mambaquant_ext.artifacts import (
    BlockLayout,
    BranchLayout,
    CheckpointError,
    ConvLayout,
    PackedModel,
    load_packed,
    read_metadata,
    save_packed,
)
from mambaquant_ext.artifacts.files import METADATA_FILE, TENSORS_FILE, read_json, tensors_checksum
from mambaquant_ext.artifacts.packed_image import images_in, open_image, write_image
from mambaquant_ext.config import Fidelity, Rotation
from mambaquant_ext.model.adapters import adapter, adapter_names
from mambaquant_ext.model.checkpoint import empty_model, skeleton
from mambaquant_ext.model.hf import import_transformers, refusals_as
from mambaquant_ext.pipeline import LANGUAGE_MODEL
from mambaquant_ext.run.mixers import check_runs_on_kernels
from mambaquant_ext.run.modules import kernel_weight
from mambaquant_ext.run.runner import LanguageRunner
from mambaquant_ext.run.swap import bare_language_model, swap_
from mambaquant_ext.transform import rotatable_rank

# Copied along where the float model's folder has them.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)


def save(
    packed: PackedModel, config: Any, folder: str | Path, companions: str | Path | None = None
) -> None:
    """Writes a quantized model: tensors, recipe and provenance, config.json, tokenizer files.

    Packed images of what was in the folder before are removed.

    Args:
        packed: from `quantize_`.
        config: the float model's configuration: transformers' `model.config`, or plain values, from which the
            model's adapter can build an equal one.
        folder: made if absent; files of the same names are replaced.
        companions: folder of the float model whose tokenizer files are copied along.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METADATA_FILE).unlink(
        missing_ok=True
    )  # written last: a half-written folder never loads
    values = config if isinstance(config, dict) else config.to_dict()
    if packed.head is not None:
        values = {**values, "tie_word_embeddings": False, "dtype": "float32"}
    values = {**values, "quantization_config": {"quant_method": "mambaquant"}}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if companions is not None:
        for name in COMPANIONS:
            source = Path(companions) / name
            if source.is_file() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
    save_packed(packed, folder)


def load(
    folder: str | Path,
    fidelity: Fidelity = Fidelity.INTEGER,
    verify: bool | None = None,
    model: nn.Module | None = None,
) -> Any:
    """A quantized model that runs; its outputs are the bits of the model that was saved.

    Where `prepack` has laid the weights out for the instruction set in use, they are mapped: nothing of them is read
    before a kernel does, and processes share them.

    Args:
        folder: written by `save`.
        fidelity: int8 kernels, or their emulation in float.
        verify: compare the checksum of every file that is used, which reads all of it. By default, unless weights
            are mapped from a packed image: then only on True.
        model: of the class that was quantized, with weights of any value, changed in place. Needed where this
            package cannot build one from config.json.

    Returns:
        transformers.MambaForCausalLM, the vision model of config.json, or `model`, with quantized modules, in eval
        mode.

    Raises:
        CheckpointError: a missing, truncated, edited, newer or foreign file; names it and the field.
        ValueError: fewer than 8 bits with Fidelity.INTEGER, or a model of another structure.
        ImportError: transformers is not installed, for a language model.
        NotImplementedError: a model is needed and none was given.
    """
    folder = Path(folder)
    packed = load_packed(folder, verify, gemm_packing() if fidelity is Fidelity.INTEGER else None)
    if packed.head is None:
        _check_names(packed, folder / METADATA_FILE)
    if model is None:
        model = _built(folder, packed) if packed.head is None else _skeleton(folder, packed)
    swap_(model, packed, fidelity)
    _check_whole(model, packed, folder)
    return model


def load_runner(folder: str | Path, verify: bool | None = None) -> LanguageRunner:
    """A language model that runs in native calls alone: transformers is neither needed nor imported.

    Args:
        folder: written by `save`.
        verify: as in `load`.

    Raises:
        CheckpointError: as `load`.
        ValueError: fewer than 8 bits, or no language model.
    """
    folder = Path(folder)
    packed = load_packed(folder, verify, gemm_packing())
    model = bare_language_model(packed)
    _language_config(folder, packed)
    return LanguageRunner(model)


def end_tokens(folder: str | Path) -> tuple[int, ...]:
    """The tokens that end a text of a language model, which transformers' generate() stops at too.

    Args:
        folder: written by `save`.

    Raises:
        CheckpointError: generation_config.json or config.json is unreadable, or has something else for eos_token_id.
    """
    path = Path(folder) / "generation_config.json"
    path = path if path.is_file() else Path(folder) / "config.json"
    found = read_json(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(
            f"{path}: eos_token_id: expected an integer of 0 or more, a list of them or null, got {found!r}"
        )
    return tuple(ids)


def prepack(folder: str | Path, isa: str | None = None) -> Path:
    """Lays the weights of a checkpoint out as the kernels of an instruction set read them, in a file beside it.

    `load` maps that file instead of packing the weights. The checkpoint itself stays as it is, and loads without it.

    Args:
        folder: written by `save`; all of it is verified.
        isa: name of an instruction set that this processor runs; by default the one in use.

    Returns:
        The file: packed-<isa>.safetensors.

    Raises:
        CheckpointError: as `load`.
        ValueError: another instruction set, or a model that no kernel runs, such as one of fewer than 8 bits.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    # Before the tensors: should they be replaced in between, the image names the old ones and is refused.
    checksum = tensors_checksum(read_metadata(folder), folder)
    packed = load_packed(folder, verify=True)
    for block in packed.blocks:
        check_runs_on_kernels(block.layout)
    with forced_isa(isa or current_isa()):
        return write_image(
            folder,
            gemm_packing(),
            checksum,
            packed.gemm_sources(),
            lambda source: kernel_weight(source.weight, source.zero_point),
        )


def packed_images(folder: str | Path) -> dict[str, str]:
    """The files of `prepack` beside a checkpoint, each one verified.

    Args:
        folder: written by `save`.

    Returns:
        By instruction set: "ready", or why `load` does not use it.

    Raises:
        CheckpointError: a damaged or foreign one, or as `load`.
    """
    folder = Path(folder)
    checksum = tensors_checksum(read_metadata(folder), folder)
    states = {}
    for isa in images_in(folder):
        if isa not in built_isas():
            states[isa] = "for an instruction set that this build lacks"
            continue
        image = open_image(folder, gemm_packing(isa), checksum)
        if image is None:
            states[isa] = "of another version of the kernels"
            continue
        image.check_sha256()
        states[isa] = "ready"
    return states


def _check_names(packed: PackedModel, where: Path) -> None:
    """The adapter is known, and the int8 layer is the one that it names."""
    if packed.adapter not in adapter_names():
        raise CheckpointError(
            f"{where}: adapter: expected one of {', '.join(adapter_names())}, got {packed.adapter!r}; "
            "register_adapter makes another one known"
        )
    head = adapter(packed.adapter).head
    if packed.linear_name not in (None, head):
        raise CheckpointError(
            f"{where}: linear: expected null or {head!r}, got {packed.linear_name!r}"
        )


def _check_whole(model: nn.Module, packed: PackedModel, folder: Path) -> None:
    """No tensor around the blocks has been left as it was, with values that the checkpoint does not know."""
    where = folder / TENSORS_FILE
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CheckpointError(f"{where}: surroundings.{name}: missing")
    if packed.head is not None:
        return
    quantized = [f"{name}.block." for name in packed.names]
    quantized += [] if packed.linear_name is None else [f"{packed.linear_name}."]
    for name in model.state_dict():
        if name not in packed.surroundings and not name.startswith(tuple(quantized)):
            raise CheckpointError(f"{where}: surroundings.{name}: missing")


def _built(folder: Path, packed: PackedModel) -> nn.Module:
    """The model of config.json without storage."""
    path = folder / "config.json"
    values = read_json(path)
    values.pop("quantization_config", None)
    try:
        return empty_model(adapter(packed.adapter), values)
    except NotImplementedError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:  # torch's, of sizes that no tensor has
        raise CheckpointError(f"{path}: {error}") from None


def _check_language_blocks(packed: PackedModel, where: Path) -> None:
    """Whether every block is what a language model's is: nothing else may be told by its layout."""
    first, recipe = packed.blocks[0].layout, packed.recipe
    if packed.adapter != LANGUAGE_MODEL:
        raise CheckpointError(
            f"{where}: adapter: expected {LANGUAGE_MODEL!r} with a head, got {packed.adapter!r}"
        )
    if not first.convs:
        raise CheckpointError(f"{where}: layers[0].convs: expected one, got none")
    expected = BlockLayout(
        hidden=first.hidden,
        dim=first.dim,
        norm_eps=first.norm_eps,
        convs=(ConvLayout(kernel=first.convs[0].kernel),),
        branches=(
            BranchLayout(
                dim=first.dim, dstate=first.branches[0].dstate, dt_rank=first.branches[0].dt_rank
            ),
        ),
        out_norm_eps=0.0,
        has_out_rotation=recipe.out_rotation,
        has_state_rotation=recipe.state_rotation,
        quantize_readout=recipe.quantize_readout,
        weight_bits=recipe.weight_bits,
        activation_bits=recipe.activation_bits,
        gate_bits=recipe.gate_bits,
    )
    for index, block in enumerate(packed.blocks):
        for field in dataclasses.fields(BlockLayout):
            wanted, got = getattr(expected, field.name), getattr(block.layout, field.name)
            if got != wanted:
                raise CheckpointError(
                    f"{where}: layers[{index}].{field.name}: expected {wanted!r} in a language model, got {got!r}"
                )


def _check_rank(values: dict[str, Any], packed: PackedModel, where: Path) -> None:
    """time_step_rank, which R5 may have widened."""
    found, dt_rank = values.get("time_step_rank"), packed.blocks[0].layout.branches[0].dt_rank
    fits = type(found) is int and found == dt_rank
    if type(found) is int and packed.recipe.dt_rotation is not Rotation.NONE:
        fits = rotatable_rank(found) == dt_rank
    if not fits:
        raise CheckpointError(
            f"{where}: time_step_rank: expected one that gives {dt_rank}, got {found!r}"
        )


def _language_config(folder: Path, packed: PackedModel) -> dict[str, Any]:
    """The values of config.json, checked against the packed language model."""
    _check_language_blocks(packed, folder / METADATA_FILE)
    path = folder / "config.json"
    values = read_json(path)
    assert packed.head is not None
    layout, vocab = packed.blocks[0].layout, packed.head.embedding.shape[0]
    expected = {
        "model_type": "mamba",
        "hidden_size": layout.hidden,
        "state_size": layout.branches[0].dstate,
        "conv_kernel": layout.convs[0].kernel[0],
        "vocab_size": vocab,
        "num_hidden_layers": len(packed.blocks),
        "intermediate_size": layout.dim,
        "layer_norm_epsilon": layout.norm_eps,
    }
    for name, value in expected.items():
        found = values.get(name)
        if type(found) is not type(value) or found != value:
            raise CheckpointError(f"{path}: {name}: expected {value!r}, got {found!r}")
    _check_rank(values, packed, path)
    values.pop("quantization_config", None)
    return values


def _skeleton(folder: Path, packed: PackedModel) -> Any:
    """The language model of config.json, without storage."""
    values, path = _language_config(folder, packed), folder / "config.json"
    transformers = import_transformers()
    with refusals_as(CheckpointError, path):
        model = skeleton(transformers.MambaConfig.from_dict(values))
    path = folder / "generation_config.json"
    if path.is_file():
        options = read_json(path)
        with refusals_as(CheckpointError, path):
            model.generation_config = transformers.GenerationConfig.from_dict(options)
    return model
