"""The checkpoint folder.

model.safetensors holds plain int8 weights and float32 scales, mambaquant.json everything else. Nothing is pickled;
every field is checked before a tensor is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambaquant_ext.artifacts.layout import BlockLayout
from mambaquant_ext.artifacts.packed import PackedBlock, PackedHead, PackedLinear, PackedModel
from mambaquant_ext.artifacts.structure import from_json
from mambaquant_ext.config import Recipe

FORMAT, FORMAT_VERSION = "mambaquant", 2
INT8_MIN, INT8_MAX = -128, 127
TENSORS_FILE, METADATA_FILE = "model.safetensors", "mambaquant.json"


class CheckpointError(ValueError):
    """A folder that is not a readable checkpoint; the message names the file and the field."""


def save_packed(model: PackedModel, folder: Path) -> None:
    """Writes a packed model.

    Both files are written under temporary names and moved into place, the metadata last, so that an
    interruption never leaves a folder that loads.

    Args:
        model: to write.
        folder: made if absent.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"surroundings.{name}": tensor for name, tensor in model.surroundings.items()}
    if model.head is not None:
        tensors.update({f"head.{name}": tensor for name, tensor in model.head.tensors().items()})
    if model.linear is not None:
        fields = dataclasses.fields(model.linear)
        tensors.update({f"linear.{f.name}": getattr(model.linear, f.name) for f in fields})
    for index, block in enumerate(model.blocks):
        tensors.update({f"layers.{index}.{name}": t for name, t in block.tensors().items()})
    (folder / METADATA_FILE).unlink(missing_ok=True)
    with _replacing(folder / TENSORS_FILE) as temporary:
        save_file(_without_sharing(tensors), temporary, {"format": FORMAT})
        checksum = _sha256(temporary)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "adapter": model.adapter,
        "recipe": model.recipe.to_dict(),
        "has_head": model.head is not None,
        "linear": model.linear_name,
        "names": list(model.names),
        "layers": [dataclasses.asdict(block.layout) for block in model.blocks],
        "calibration": dict(model.provenance),
        "tensors_sha256": checksum,
    }
    with _replacing(folder / METADATA_FILE) as temporary:
        temporary.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def load_packed(folder: Path, verify: bool = True) -> PackedModel:
    """Reads a packed model; its tensors are memory-mapped.

    Args:
        folder: written by save_packed.
        verify: compare the tensor file's SHA-256 with the one recorded.

    Raises:
        CheckpointError: a missing, truncated, edited, newer or foreign file; nothing is returned half-loaded.
    """
    metadata = read_metadata(folder)
    where = folder / METADATA_FILE
    try:
        recipe = Recipe.from_dict(_field(metadata, "recipe", dict, where))
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    layouts = _layouts(metadata, recipe, where)
    names = _field(metadata, "names", list, where)
    if len(names) != len(layouts) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: names: expected {len(layouts)} strings, got {names!r}")
    # null for a model without an int8 layer of its own outside the blocks.
    is_null = "linear" in metadata and metadata["linear"] is None
    linear_name = None if is_null else _field(metadata, "linear", str, where)
    adapter, has_head = (
        _field(metadata, "adapter", str, where),
        _field(metadata, "has_head", bool, where),
    )
    calibration = _field(metadata, "calibration", dict, where)
    checksum = _field(metadata, "tensors_sha256", str, where)
    tensors = _read_tensors(folder / TENSORS_FILE, checksum if verify else None)
    blocks = tuple(_block(tensors, index, layout, folder) for index, layout in enumerate(layouts))
    head = _head(tensors, layouts[0].hidden, folder) if has_head else None
    linear = None if linear_name is None else _linear(tensors, folder)
    surroundings = {} if has_head else _surroundings(tensors)
    if tensors:
        raise CheckpointError(f"{folder / TENSORS_FILE}: unknown tensor {min(tensors)}")
    return PackedModel(
        adapter=adapter,
        names=tuple(names),
        blocks=blocks,
        head=head,
        surroundings=surroundings,
        linear_name=linear_name,
        linear=linear,
        recipe=recipe,
        provenance=calibration,
    )


def _layouts(metadata: Mapping[str, Any], recipe: Recipe, where: Path) -> list[BlockLayout]:
    values = _field(metadata, "layers", list, where)
    if not values:
        raise CheckpointError(f"{where}: layers: expected at least 1, got 0")
    try:
        layouts = [from_json(BlockLayout, v, f"layers[{i}]") for i, v in enumerate(values)]
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    for index, layout in enumerate(layouts):
        _check_layout(layout, recipe, f"{where}: layers[{index}]")
    return layouts


def _without_sharing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share storage, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        if own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        result[name] = own
    return result


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a checkpoint, with its format and version checked.

    Raises:
        CheckpointError: missing, not JSON, foreign or newer.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: not found; expected a folder made by `mambaquant quantize`")
    metadata = read_json(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format: expected {FORMAT!r}, got {metadata.get('format')!r}"
        )
    version = metadata.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        hint = ""
        if type(version) is int:
            is_newer = version > FORMAT_VERSION
            hint = (
                "; it was made by a newer mambaquant_ext, upgrade to read it"
                if is_newer
                else "; it was made by an older mambaquant_ext, quantize the float model again"
            )
        raise CheckpointError(
            f"{path}: format_version: expected {FORMAT_VERSION}, got {version!r}{hint}"
        )
    return metadata


def read_json(path: Path, refusal: type[ValueError] = CheckpointError) -> dict[str, Any]:
    """A file that holds one JSON object.

    Args:
        path: of the file.
        refusal: the error to raise, CheckpointError unless the file is no checkpoint's.

    Raises:
        ValueError: `refusal`, for a file that is missing or holds something else.
    """
    if not path.is_file():
        raise refusal(f"{path}: not found")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, not JSON, or endless digits or brackets
        raise refusal(f"{path}: expected JSON, got {error}") from None
    if not isinstance(values, dict):
        raise refusal(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _check_layout(layout: BlockLayout, recipe: Recipe, where: str) -> None:
    """What both the recipe and a layout say must be the same."""
    wanted = {
        "has_out_rotation": recipe.out_rotation,
        "has_state_rotation": recipe.state_rotation,
        "quantize_readout": recipe.quantize_readout,
        "weight_bits": recipe.weight_bits,
        "activation_bits": recipe.activation_bits,
        "gate_bits": recipe.gate_bits,
    }
    for name, value in wanted.items():
        if getattr(layout, name) != value:
            raise CheckpointError(
                f"{where}.{name}: expected {value!r} as in recipe, got {getattr(layout, name)!r}"
            )


def _field(values: Mapping[str, Any], name: str, kind: type, where: Path) -> Any:
    if name not in values:
        raise CheckpointError(f"{where}: {name}: missing")
    value = values[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{where}: {name}: expected {kind.__name__}, got {value!r}")
    return value


def _read_tensors(path: Path, checksum: str | None) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: not found")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None
    if checksum is not None and (found := _sha256(path)) != checksum:
        raise CheckpointError(
            f"{path}: expected SHA-256 {checksum} ({METADATA_FILE}: tensors_sha256), got {found}; the file was "
            "changed after it was written"
        )
    return tensors


def _take(
    tensors: dict[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    folder: Path,
) -> Tensor:
    where = folder / TENSORS_FILE
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise CheckpointError(f"{where}: tensor {name}: missing")
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(
            f"{where}: tensor {name}: expected {wanted} of shape {shape}, got "
            f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
        )
    wanted = _missing_property(name, tensor)
    if wanted:
        raise CheckpointError(f"{where}: tensor {name}: expected {wanted}")
    return tensor


def _missing_property(name: str, tensor: Tensor) -> str:
    """What the kernels rely on and the values of a tensor lack, or nothing."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        return "finite values, got inf or NaN"
    if name.endswith("scale") and not bool(((tensor > 0) & (1 / tensor).isfinite()).all()):
        return "scales above 0 with a finite reciprocal"
    if tensor.dtype == torch.int8 and bool((tensor == INT8_MIN).any()):
        return "weights from -127 to 127, got -128"
    if name.endswith("zero_point"):
        is_int8 = (tensor >= INT8_MIN) & (tensor <= INT8_MAX)
        return "" if bool(is_int8.all()) else "zero points from -128 to 127"
    return ""


def _block(
    tensors: dict[str, Tensor], index: int, layout: BlockLayout, folder: Path
) -> PackedBlock:
    return PackedBlock.from_tensors(
        layout,
        {
            name: _take(tensors, f"layers.{index}.{name}", shape, (dtype,), folder)
            for name, (shape, dtype) in layout.expected().items()
        },
    )


def _linear(tensors: dict[str, Tensor], folder: Path) -> PackedLinear:
    weight = tensors.get("linear.weight")
    if weight is None or weight.dim() != 2:
        raise CheckpointError(
            f"{folder / TENSORS_FILE}: tensor linear.weight: expected a matrix, got "
            f"{'nothing' if weight is None else tuple(weight.shape)}"
        )
    shape, f32 = tuple(weight.shape), (torch.float32,)
    return PackedLinear(
        weight=_take(tensors, "linear.weight", shape, (torch.int8,), folder),
        weight_scale=_take(tensors, "linear.weight_scale", shape[:1], f32, folder),
        bias=_take(tensors, "linear.bias", shape[:1], f32, folder),
        in_scale=_take(tensors, "linear.in_scale", (1,), f32, folder),
    )


def _surroundings(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whatever stands around the blocks: the model knows the shapes, and no kernel relies on values."""
    prefix = "surroundings."
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _head(tensors: dict[str, Tensor], hidden: int, folder: Path) -> PackedHead:
    embedding = tensors.get("head.embedding")
    vocab = 0 if embedding is None or embedding.dim() == 0 else embedding.shape[0]
    if embedding is not None and vocab == 0:
        raise CheckpointError(
            f"{folder / TENSORS_FILE}: tensor head.embedding: expected rows, got none"
        )
    matrix, rows = (vocab, hidden), (vocab,)
    f32, int8 = torch.float32, torch.int8

    def optional(name: str, shape: tuple[int, ...], present: bool) -> Tensor | None:
        return _take(tensors, name, shape, (f32,), folder) if present else None

    embedding = _take(tensors, "head.embedding", matrix, (int8, torch.float16), folder)
    lm_head = _take(tensors, "head.lm_head", matrix, (int8, f32), folder)
    is_int8_head = lm_head.dtype == int8
    return PackedHead(
        embedding=embedding,
        embedding_scale=optional("head.embedding_scale", rows, embedding.dtype == int8),
        norm_f=_take(tensors, "head.norm_f", (hidden,), (f32,), folder),
        lm_head=lm_head,
        lm_head_scale=optional("head.lm_head_scale", rows, is_int8_head),
        head_scale=optional("head.head_scale", (1,), is_int8_head),
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes `path`'s place if the block succeeds."""
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
