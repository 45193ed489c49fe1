"""Float checkpoints on disk: transformers folders, folders in mamba_ssm's own format, and vision models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambaquant_ext.artifacts.files import read_json
from mambaquant_ext.model.adapters import Adapter, adapter_of_config
from mambaquant_ext.model.hf import import_transformers, refusals_as

# What mamba_ssm assumes where its config.json is silent (MambaConfig and the Mamba module's defaults).
_MAMBA_SSM_DEFAULTS: dict[str, Any] = {
    "layer": "Mamba1",
    "d_state": 16,
    "d_conv": 4,
    "expand": 2,
    "dt_rank": "auto",
    "bias": False,
    "conv_bias": True,
}
_VOCAB_MULTIPLE = 8


class ModelFormatError(ValueError):
    """A folder that is not a model of a known kind; the message names the file and the field."""


def load_float_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A float model from a folder on disk; nothing is downloaded.

    Args:
        folder: with config.json and model.safetensors or pytorch_model.bin, in transformers' or mamba_ssm's
            format, or with a config.json that an adapter reads. pytorch_model.bin is read with weights_only.
        dtype: of the weights in memory.

    Returns:
        transformers.MambaForCausalLM, or the adapter's model, in eval mode.

    Raises:
        ModelFormatError: another kind of model, or missing, truncated or misshapen files.
        ImportError: transformers is not installed, for a language model.
    """
    where = folder / "config.json"
    config = _read_config(folder)
    if "quantization_config" in config:
        raise ModelFormatError(
            f"{where}: expected a float model, got one that is quantized already"
        )
    adapter = adapter_of_config(config)
    if adapter is not None:
        return _load_built(adapter, config, folder, dtype)
    transformers = import_transformers()
    values = config if "model_type" in config else _mamba_ssm_config(config, where)
    if values.get("model_type", "mamba") != "mamba":
        raise ModelFormatError(
            f"{where}: model_type: expected 'mamba', got {values['model_type']!r}"
        )
    with refusals_as(ModelFormatError, where):
        model = skeleton(transformers.MambaConfig.from_dict(values))
    state = {_hf_name(name): tensor for name, tensor in _read_state(folder).items()}
    if "lm_head.weight" not in state and "backbone.embeddings.weight" in state:
        state["lm_head.weight"] = state["backbone.embeddings.weight"]
    _check_state(state, model, folder)
    model.load_state_dict({name: t.to(dtype) for name, t in state.items()}, assign=True)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()


def vision_config(folder: Path) -> Any:
    """The configuration of a vision model, float or quantized, from its config.json alone.

    Args:
        folder: of the model.

    Returns:
        The model's `config`, or None for a language model.

    Raises:
        ModelFormatError: no config.json, or not of a known kind.
    """
    values = _read_config(folder)
    adapter = adapter_of_config(values)
    if adapter is None:
        return None
    values.pop("quantization_config", None)
    return _empty_model_of(folder, adapter, values).config


def empty_model(adapter: Adapter, config: Mapping[str, Any]) -> nn.Module:
    """An adapter's model without storage, to be filled with tensors or quantized modules.

    Args:
        adapter: that builds it.
        config: plain values.

    Raises:
        ValueError: a value that is not supported.
    """
    with torch.device("meta"):
        return adapter.build(config)


def _empty_model_of(folder: Path, adapter: Adapter, config: Mapping[str, Any]) -> nn.Module:
    try:
        return empty_model(adapter, config)
    except ValueError as error:
        raise ModelFormatError(f"{folder / 'config.json'}: {error}") from None


def _load_built(
    adapter: Adapter, config: Mapping[str, Any], folder: Path, dtype: torch.dtype
) -> nn.Module:
    model = _empty_model_of(folder, adapter, config)
    state = _read_state(folder)
    _check_state(state, model, folder)
    model.load_state_dict({name: t.to(dtype) for name, t in state.items()}, assign=True)
    return model.eval()


def skeleton(config: Any) -> Any:
    """A MambaForCausalLM without storage, to be filled with tensors or quantized modules."""
    transformers = import_transformers()
    with torch.device("meta"):
        return transformers.MambaForCausalLM(config)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFormatError(f"{path}: not found; expected a model folder")
    config = read_json(path, ModelFormatError)
    is_language = "model_type" in config or {"d_model", "n_layer"} <= config.keys()
    if not is_language and adapter_of_config(config) is None:
        raise ModelFormatError(
            f"{path}: expected model_type (transformers), d_model and n_layer (mamba_ssm), or a known architecture"
        )
    return config


def _mamba_ssm_config(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """mamba_ssm's MambaConfig as the fields of transformers' MambaConfig."""
    ssm_cfg = config.get("ssm_cfg") or {}
    if not isinstance(ssm_cfg, dict):
        raise ModelFormatError(f"{where}: ssm_cfg: expected an object, got {ssm_cfg!r}")
    ssm = {**_MAMBA_SSM_DEFAULTS, **ssm_cfg}
    refused: tuple[tuple[str, Any, Any], ...] = (
        ("ssm_cfg.layer", ssm["layer"], "Mamba1"),
        ("attn_layer_idx", config.get("attn_layer_idx") or [], []),
        ("d_intermediate", config.get("d_intermediate", 0), 0),
        ("rms_norm", config.get("rms_norm", True), True),
    )
    for name, value, expected in refused:
        if value != expected:
            raise ModelFormatError(f"{where}: {name}: expected {expected!r}, got {value!r}")

    def integer(values: dict[str, Any], name: str, default: int | None = None) -> int:
        value = values.get(name, default)
        if type(value) is not int or value < 1:
            raise ModelFormatError(
                f"{where}: {name}: expected an integer of at least 1, got {value!r}"
            )
        return value

    multiple = integer(config, "pad_vocab_size_multiple", _VOCAB_MULTIPLE)
    return {
        "vocab_size": -(-integer(config, "vocab_size") // multiple) * multiple,
        "hidden_size": integer(config, "d_model"),
        "num_hidden_layers": integer(config, "n_layer"),
        "state_size": integer(ssm, "d_state"),
        "conv_kernel": integer(ssm, "d_conv"),
        "expand": integer(ssm, "expand"),
        "time_step_rank": "auto" if ssm["dt_rank"] == "auto" else integer(ssm, "dt_rank"),
        "use_bias": bool(ssm["bias"]),
        "use_conv_bias": bool(ssm["conv_bias"]),
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": bool(config.get("residual_in_fp32", True)),
        "tie_word_embeddings": bool(config.get("tie_embeddings", True)),
    }


def _hf_name(name: str) -> str:
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def _read_state(folder: Path) -> dict[str, Tensor]:
    safetensors_files = sorted(folder.glob("model*.safetensors"))
    try:
        if safetensors_files:
            from safetensors.torch import load_file

            state: dict[str, Tensor] = {}
            for path in safetensors_files:
                state.update(load_file(path))
            return state
        path = folder / "pytorch_model.bin"
        if path.is_file():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(loaded, dict) and all(isinstance(v, Tensor) for v in loaded.values()):
                return loaded
            raise ModelFormatError(f"{path}: expected a dictionary of tensors")
    except ModelFormatError:
        raise
    except Exception as error:
        # The first sentence: torch goes on to advise turning weights_only off.
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        reason = first_line.partition(". ")[0]
        raise ModelFormatError(f"{path}: cannot be read: {reason}") from None
    raise ModelFormatError(
        f"{folder}: expected model.safetensors or pytorch_model.bin, found neither"
    )


def _check_state(state: dict[str, Tensor], model: Any, folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in state:
            raise ModelFormatError(f"{folder}: tensor {name}: missing")
        if tuple(state[name].shape) != shape:
            raise ModelFormatError(
                f"{folder}: tensor {name}: expected shape {shape}, got {tuple(state[name].shape)}"
            )
    for name in sorted(set(state) - set(expected)):
        raise ModelFormatError(f"{folder}: tensor {name}: unknown for this config.json")
