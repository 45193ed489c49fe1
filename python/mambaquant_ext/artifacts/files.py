"""The checkpoint folder.

model.safetensors holds plain int8 weights and float32 scales, mambaquant.json everything else. Nothing is pickled;
every field is checked before a tensor is used.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mambaquant_ext._load import GemmPacking
from mambaquant_ext.artifacts.layout import BlockLayout
from mambaquant_ext.artifacts.packed import (
    HEAD_WEIGHT,
    LINEAR_WEIGHT,
    PackedBlock,
    PackedHead,
    PackedLinear,
    PackedModel,
    block_prefix,
)
from mambaquant_ext.artifacts.packed_image import IMAGE_GLOB, open_image
from mambaquant_ext.artifacts.structure import from_json
from mambaquant_ext.artifacts.tensor_file import CheckpointError, TensorFile, replacing, sha256
from mambaquant_ext.config import Recipe

FORMAT, FORMAT_VERSION = "mambaquant", 2
INT8_MIN, INT8_MAX = -128, 127
TENSORS_FILE, METADATA_FILE = "model.safetensors", "mambaquant.json"


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
        tensors.update({block_prefix(index) + name: t for name, t in block.tensors().items()})
    (folder / METADATA_FILE).unlink(missing_ok=True)
    for image in folder.glob(IMAGE_GLOB):  # of the tensors that are replaced
        image.unlink()
    with replacing(folder / TENSORS_FILE) as temporary:
        save_file(_without_sharing(tensors), temporary, {"format": FORMAT})
        checksum = sha256(temporary)
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
    with replacing(folder / METADATA_FILE) as temporary:
        temporary.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def load_packed(
    folder: Path, verify: bool | None = None, packing: GemmPacking | None = None
) -> PackedModel:
    """Reads a packed model; its tensors are memory-mapped.

    Args:
        folder: written by save_packed.
        verify: compare each file's SHA-256 with the one recorded, which reads all of it. By default, unless a packed
            image is used: then the matrices that it holds and the embedding are not even looked at, unless asked
            for by True.
        packing: of the kernels to run on: a packed image that fits them is mapped too.

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
    checksum = tensors_checksum(metadata, folder)
    file = TensorFile.map(folder / TENSORS_FILE)
    image = None if packing is None else open_image(folder, packing, checksum)
    verify = image is None if verify is None else verify
    if verify:
        _check_sha256(file.path, checksum)
    unread = () if image is None or verify else (*image.file.tensors, "head.embedding")
    file.expect_few_reads(name for name in unread if name in file.table)
    tensors = _Tensors(dict(file.tensors), file.path, frozenset(unread))
    blocks = tuple(_block(tensors, index, layout) for index, layout in enumerate(layouts))
    head = _head(tensors, layouts[0].hidden) if has_head else None
    linear = None if linear_name is None else _linear(tensors)
    surroundings = {} if has_head else tensors.take_all("surroundings.")
    if tensors.left:
        raise CheckpointError(f"{file.path}: unknown tensor {min(tensors.left)}")
    model = PackedModel(
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
    if image is None:
        return model
    if verify:
        image.check_sha256()
    return dataclasses.replace(model, kernel_weights=image.kernel_weights(model.gemm_sources()))


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


def tensors_checksum(metadata: Mapping[str, Any], folder: Path) -> str:
    """The recorded SHA-256 of a checkpoint's tensor file.

    Args:
        metadata: from read_metadata.
        folder: of the checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    checksum: str = _field(metadata, "tensors_sha256", str, folder / METADATA_FILE)
    return checksum


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


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of a file that nobody has taken yet.

    Attributes:
        left: by name.
        where: the file, for errors.
        unread: names of those whose values have been checked already, when the image was made that stands in for them.
    """

    left: dict[str, Tensor]
    where: Path
    unread: frozenset[str]

    def take(
        self, name: str, shape: tuple[int, ...], dtypes: torch.dtype | tuple[torch.dtype, ...]
    ) -> Tensor:
        """A tensor, checked."""
        dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise CheckpointError(f"{self.where}: tensor {name}: missing")
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(
                f"{self.where}: tensor {name}: expected {wanted} of shape {shape}, got "
                f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
            )
        wanted = "" if name in self.unread else _missing_property(name, tensor)
        if wanted:
            raise CheckpointError(f"{self.where}: tensor {name}: expected {wanted}")
        return tensor

    def take_all(self, prefix: str) -> dict[str, Tensor]:
        """Whatever stands around the blocks: the model knows the shapes, and no kernel relies on values."""
        names = [name for name in self.left if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.left.pop(name) for name in names}


def _check_sha256(path: Path, checksum: str) -> None:
    found = sha256(path)
    if found != checksum:
        raise CheckpointError(
            f"{path}: expected SHA-256 {checksum} ({METADATA_FILE}: tensors_sha256), got {found}; the file was "
            "changed after it was written"
        )


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


def _block(tensors: _Tensors, index: int, layout: BlockLayout) -> PackedBlock:
    prefix = block_prefix(index)
    return PackedBlock.from_tensors(
        layout,
        {
            name: tensors.take(prefix + name, shape, dtype)
            for name, (shape, dtype) in layout.expected().items()
        },
    )


def _linear(tensors: _Tensors) -> PackedLinear:
    weight = tensors.left.get(LINEAR_WEIGHT)
    if weight is None or weight.dim() != 2:
        raise CheckpointError(
            f"{tensors.where}: tensor {LINEAR_WEIGHT}: expected a matrix, got "
            f"{'nothing' if weight is None else tuple(weight.shape)}"
        )
    shape, f32 = tuple(weight.shape), torch.float32
    return PackedLinear(
        weight=tensors.take(LINEAR_WEIGHT, shape, torch.int8),
        weight_scale=tensors.take("linear.weight_scale", shape[:1], f32),
        bias=tensors.take("linear.bias", shape[:1], f32),
        in_scale=tensors.take("linear.in_scale", (1,), f32),
    )


def _head(tensors: _Tensors, hidden: int) -> PackedHead:
    embedding = tensors.left.get("head.embedding")
    vocab = 0 if embedding is None or embedding.dim() == 0 else embedding.shape[0]
    if embedding is not None and vocab == 0:
        raise CheckpointError(f"{tensors.where}: tensor head.embedding: expected rows, got none")
    matrix, rows = (vocab, hidden), (vocab,)
    f32, int8 = torch.float32, torch.int8

    def optional(name: str, shape: tuple[int, ...], present: bool) -> Tensor | None:
        return tensors.take(name, shape, f32) if present else None

    embedding = tensors.take("head.embedding", matrix, (int8, torch.float16))
    lm_head = tensors.take(HEAD_WEIGHT, matrix, (int8, f32))
    is_int8_head = lm_head.dtype == int8
    return PackedHead(
        embedding=embedding,
        embedding_scale=optional("head.embedding_scale", rows, embedding.dtype == int8),
        norm_f=tensors.take("head.norm_f", (hidden,), f32),
        lm_head=lm_head,
        lm_head_scale=optional("head.lm_head_scale", rows, is_int8_head),
        head_scale=optional("head.head_scale", (1,), is_int8_head),
    )
