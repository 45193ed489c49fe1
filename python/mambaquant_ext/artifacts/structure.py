"""Dataclasses from JSON values, every field checked."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from typing import Any, TypeVar

_T = TypeVar("_T")


def from_json(kind: type[_T], value: Any, where: str) -> _T:
    """The inverse of dataclasses.asdict followed by JSON.

    Args:
        kind: a dataclass of bools, ints, floats, strings, enums, tuples, optionals and such dataclasses.
        value: what JSON gave.
        where: name of the value, for errors.

    Raises:
        ValueError: a missing or unknown field, or a value of another type; the message names it.
    """
    result: _T = _converted(kind, value, where)
    return result


def _converted(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        element = typing.get_args(kind)[0]
        return tuple(_converted(element, v, f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if issubclass(kind, enum.Enum):
        known = [member.value for member in kind]
        if value not in known:
            raise ValueError(
                f"{where}: expected one of {', '.join(map(str, known))}, got {value!r}"
            )
        return kind(value)
    is_number = kind is float and isinstance(value, int)  # JSON writes 0.0 as it likes
    if isinstance(value, bool) != (kind is bool) or not (isinstance(value, kind) or is_number):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    try:
        return kind(value)
    except OverflowError:  # an int that no float holds
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}") from None


@functools.cache
def _type_hints(kind: Any) -> dict[str, Any]:
    """The annotations of a class, which are text to be compiled: half of what reading a checkpoint's metadata took."""
    return typing.get_type_hints(kind)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {value!r}")
    hints = _type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name in sorted(set(value) - set(names)):
        raise ValueError(f"{where}.{name}: unknown field")
    for name in names:
        if name not in value:
            raise ValueError(f"{where}.{name}: missing")
    values = {name: _converted(hints[name], value[name], f"{where}.{name}") for name in names}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
