"""What the configurations of the vision models share: checks of their fields, and plain values both ways."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

C = TypeVar("C", bound="FieldConfig")


class FieldConfig:
    """Base of the frozen dataclasses that describe a model."""

    __slots__ = ()

    VERSION: ClassVar[int] = 1

    def check_fields(self, may_be_zero: frozenset[str] = frozenset()) -> None:
        """Refuses values of another type than a field's annotation, and numbers that are not positive.

        Args:
            may_be_zero: names of fields whose numbers may be 0.

        Raises:
            ValueError: names the field, what it expects and its value.
        """
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                self.refuse(name, _describe(hint))
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers:
                if isinstance(number, bool) or not isinstance(number, int | float):
                    continue
                if (
                    not math.isfinite(number)
                    or number < 0
                    or (number == 0 and name not in may_be_zero)
                ):
                    bound = "0 or more" if name in may_be_zero else "more than 0"
                    self.refuse(name, bound)

    def refuse(self, name: str, expected: str) -> typing.NoReturn:
        """Raises the error of a bad field.

        Args:
            name: of the field.
            expected: what it should be.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__}.{name}: expected {expected}, got {getattr(self, name)!r}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, with the version of the fields."""
        values = {name: plain(getattr(self, name)) for name in _hints(type(self))}
        return {"version": self.VERSION, **values}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """The inverse of to_dict.

        Args:
            values: every field by name, and the version.

        Raises:
            ValueError: an unknown or missing field, a value of the wrong type or range, or an unknown version.
        """
        if values.get("version") != cls.VERSION:
            raise ValueError(
                f"{cls.__name__}.version: expected {cls.VERSION}, got {values.get('version')!r}"
            )
        hints = _hints(cls)
        for name in values:
            if name not in hints and name != "version":
                raise ValueError(f"{cls.__name__}.{name}: unknown field")
        for name in hints:
            if name not in values:
                raise ValueError(f"{cls.__name__}.{name}: missing")
        return cls(**{name: typed(values[name], hint) for name, hint in hints.items()})


def _hints(cls: type[FieldConfig]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    """A field's value as JSON has it: tuples as lists, enums as their values.

    Args:
        value: of a field.
    """
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def typed(value: Any, hint: Any) -> Any:
    """A plain value as the field's type; what does not fit stays as it is for the check to refuse.

    Args:
        value: as JSON gives it.
        hint: annotation of the field.
    """
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(typed(item, typing.get_args(hint)[0]) for item in value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return next((member for member in hint if member.value == value), value)
    return value


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and bool(value) and all(_fits(v, item) for v in value)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a tuple of one or more values, each {_describe(typing.get_args(hint)[0])}"
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"{hint.__name__}, one of {', '.join(str(member.value) for member in hint)}"
    return "None" if hint is types.NoneType else str(hint.__name__)
