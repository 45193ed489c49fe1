"""Saving a quantized model as a folder, and loading it as a model that runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mambaquant_ext.artifacts import CheckpointError, PackedModel, load_packed, save_packed
from mambaquant_ext.artifacts.files import METADATA_FILE, read_json
from mambaquant_ext.config import Fidelity
from mambaquant_ext.model.checkpoint import skeleton
from mambaquant_ext.model.hf import import_transformers, refusals_as
from mambaquant_ext.run.swap import swap_

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

    Args:
        packed: from `quantize_`.
        config: the float model's configuration (`model.config`), a transformers MambaConfig.
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
    values = {
        **config.to_dict(),
        "tie_word_embeddings": False,
        "dtype": "float32",
        "quantization_config": {"quant_method": "mambaquant"},
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if companions is not None:
        for name in COMPANIONS:
            source = Path(companions) / name
            if source.is_file() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
    save_packed(packed, folder)


def load(folder: str | Path, fidelity: Fidelity = Fidelity.INTEGER, verify: bool = True) -> Any:
    """A quantized model that runs; its logits are the bits of the model that was saved.

    Args:
        folder: written by `save`.
        fidelity: int8 kernels, or their emulation in float.
        verify: compare the tensor file's checksum.

    Returns:
        transformers.MambaForCausalLM with quantized modules, in eval mode.

    Raises:
        CheckpointError: a missing, truncated, edited, newer or foreign file; names it and the field.
        ValueError: fewer than 8 bits with Fidelity.INTEGER.
        ImportError: transformers is not installed.
    """
    folder = Path(folder)
    packed = load_packed(folder, verify)
    model = _skeleton(folder, packed)
    path = folder / "generation_config.json"
    if path.is_file():
        options, transformers = read_json(path), import_transformers()
        with refusals_as(CheckpointError, path):
            model.generation_config = transformers.GenerationConfig.from_dict(options)
    swap_(model, packed, fidelity)
    return model


def _skeleton(folder: Path, packed: PackedModel) -> Any:
    """The model of config.json, without storage, checked against the packed model."""
    path = folder / "config.json"
    values = read_json(path)
    sizes, vocab = packed.blocks[0].sizes, packed.head.embedding.shape[0]
    expected = {
        "model_type": "mamba",
        "hidden_size": sizes.hidden,
        "state_size": sizes.dstate,
        "time_step_rank": sizes.dt_rank,
        "conv_kernel": sizes.width,
        "vocab_size": vocab,
        "num_hidden_layers": len(packed.blocks),
        "intermediate_size": sizes.dim,
        "layer_norm_epsilon": packed.options.norm_eps,
    }
    for name, value in expected.items():
        found = values.get(name)
        if type(found) is not type(value) or found != value:
            raise CheckpointError(f"{path}: {name}: expected {value!r}, got {found!r}")
    values.pop("quantization_config", None)
    transformers = import_transformers()
    with refusals_as(CheckpointError, path):
        return skeleton(transformers.MambaConfig.from_dict(values))
