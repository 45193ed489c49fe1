"""Recipes: which transforms, bit widths and ranges a quantized model is made with."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RECIPE_VERSION = 2


class Rotation(str, enum.Enum):
    """How an offline rotation is built.

    HADAMARD is QuaRot's; KLT is MambaQuant's K H: eigenvectors of the calibrated second moment first, then
    Hadamard, which gives every rotated channel the same mean square (paper section 4.2, eq. 13).
    """

    NONE = "none"
    HADAMARD = "hadamard"
    KLT = "klt"


class Observer(str, enum.Enum):
    """How a static range is chosen from calibration data."""

    ABSMAX = "absmax"
    PERCENTILE = "percentile"
    MSE = "mse"


class Granularity(str, enum.Enum):
    """How many static scales an activation has where the kernels leave the choice (conv input, gate, x, B)."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"


class Fidelity(str, enum.Enum):
    """How a quantized block computes: on int8 kernels, or in float with values rounded to the same grid."""

    INTEGER = "integer"
    EMULATED = "emulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides how a model is quantized; each switch can be turned off alone.

    Attributes:
        name: for tables and checkpoints.
        weight_bits: 2 to 8, symmetric per output channel. Fewer than 8 run emulated only.
        activation_bits: 2 to 8. Fewer than 8 run emulated only.
        gate_bits: bits of the gate z, 2 to 8.
        quantize_head: the head's weight and input at weight_bits and activation_bits; otherwise float32. Models
            whose head the adapter does not name keep it in float.
        quantize_embedding: the embedding table as int8 with one scale a row; otherwise float16.
        residual_rotation: R1, rotation of the residual stream, folded into the weights; where a model's stream cannot
            be rotated as a whole, an online Hadamard transform between norm and in_proj.
        out_rotation: R2, online Hadamard transform before out_proj.
        state_rotation: R4, Hadamard transform of the state axis at the h C read-out.
        dt_rotation: R5, rotation inside the low-rank pair x_proj -> dt_proj, per layer.
        smooth_gate: S2, smoothing of out_proj's input through the gate (S-SiLU).
        smooth_state: S4, smoothing of B and C along the state axis; the state is kept in the scaled basis.
        smooth_dt: S5, smoothing of dt between x_proj and dt_proj.
        smooth_in: S1, SmoothQuant between the norm and in_proj; not with a residual_rotation.
        center_dt: subtracts the calibrated mid-range of dt, exact in floating point.
        separate_class_token: the class token of a vision model has a range of its own at out_proj's input.
        quantize_readout: int8 h C product (level L2); otherwise the read-out is float (level L1).
        observer: how static ranges are chosen.
        percentile: share of values inside the range, per sign, with Observer.PERCENTILE.
        granularity: scales of the conv input, the gate, x and B.
        version: of this class's fields, for checkpoints.
    """

    name: str
    weight_bits: int = 8
    activation_bits: int = 8
    gate_bits: int = 8
    quantize_head: bool = True
    quantize_embedding: bool = True
    residual_rotation: Rotation = Rotation.KLT
    out_rotation: bool = True
    state_rotation: bool = True
    dt_rotation: Rotation = Rotation.KLT
    smooth_gate: bool = True
    smooth_state: bool = True
    smooth_dt: bool = True
    smooth_in: bool = False
    center_dt: bool = True
    separate_class_token: bool = True
    quantize_readout: bool = True
    observer: Observer = Observer.PERCENTILE
    percentile: float = 0.999999
    granularity: Granularity = Granularity.PER_CHANNEL
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a value of another type or outside its range, an unknown version, or switches that exclude
                each other.
        """
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), _KINDS[str(field.type)]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(
                    f"Recipe.{field.name}: expected {_description(field)}, got {value!r}"
                )
        if self.version != RECIPE_VERSION:
            raise ValueError(f"Recipe.version: expected {RECIPE_VERSION}, got {self.version!r}")
        for name in ("weight_bits", "activation_bits", "gate_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise ValueError(f"Recipe.{name}: expected 2 to 8, got {getattr(self, name)!r}")
        if not 0.5 < self.percentile <= 1:
            raise ValueError(f"Recipe.percentile: expected 0.5 < p <= 1, got {self.percentile!r}")
        if self.state_rotation and not self.quantize_readout:
            raise ValueError(
                "Recipe.state_rotation: expected False when quantize_readout is False, got True"
            )
        if self.smooth_in and self.residual_rotation is not Rotation.NONE:
            raise ValueError("Recipe.smooth_in: expected False with a residual_rotation, got True")

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            key: value.value if isinstance(value, enum.Enum) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of to_dict.

        Raises:
            ValueError: an unknown or missing field, a value of the wrong type or range, or an unknown version.
        """
        if values.get("version") != RECIPE_VERSION:
            raise ValueError(
                f"recipe.version: expected {RECIPE_VERSION}, got {values.get('version')!r}"
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ValueError(f"recipe.{name}: unknown field")
        converted: dict[str, Any] = {}
        for name, field in fields.items():
            if name not in values:
                raise ValueError(f"recipe.{name}: missing")
            value, kind = values[name], _KINDS[str(field.type)]
            if isinstance(kind, type) and issubclass(kind, enum.Enum):
                # An unknown word stays as it is for __post_init__ to refuse.
                value = next((member for member in kind if member.value == value), value)
            converted[name] = value
        return cls(**converted)


# What a field's annotation accepts; bool is no int here.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "Rotation": Rotation,
    "Observer": Observer,
    "Granularity": Granularity,
}


def _description(field: dataclasses.Field[Any]) -> str:
    kind = _KINDS[str(field.type)]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"{field.type}, one of {', '.join(member.value for member in kind)}"
    return str(field.type)


_UNTRANSFORMED: dict[str, Any] = {
    "residual_rotation": Rotation.NONE,
    "out_rotation": False,
    "state_rotation": False,
    "dt_rotation": Rotation.NONE,
    "smooth_gate": False,
    "smooth_state": False,
    "smooth_dt": False,
    "center_dt": False,
    "separate_class_token": False,
    "observer": Observer.ABSMAX,
    "granularity": Granularity.PER_TENSOR,
}

PRESETS: dict[str, Recipe] = {
    "w8a8": Recipe(name="w8a8"),
    "rtn": Recipe(name="rtn", **_UNTRANSFORMED),
    "smoothquant": Recipe(name="smoothquant", **{**_UNTRANSFORMED, "smooth_in": True}),
    "quarot": Recipe(
        name="quarot",
        **{
            **_UNTRANSFORMED,
            "residual_rotation": Rotation.HADAMARD,
            "out_rotation": True,
            "state_rotation": True,
            "dt_rotation": Rotation.HADAMARD,
        },
    ),
}


def recipe(name: str) -> Recipe:
    """The preset of that name.

    Args:
        name: "w8a8" (MambaQuant), "rtn" (round to nearest), "smoothquant" or "quarot".

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"recipe: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
