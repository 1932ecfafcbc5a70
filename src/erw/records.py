"""Frozen settings records as JSON values and back, and the checks that they make of themselves.

`to_dict` and `from_dict` are exact inverses, and `from_dict` refuses an unknown key with the
nearest known one.
"""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal

from erw.errors import ConfigError

T = typing.TypeVar("T")


def at_least(group: str, name: str, value: int, low: int) -> None:
    """Raise ConfigError unless value >= low."""
    if value < low:
        raise ConfigError(f"{group}.{name} is {value}; expected {low} or more")


def above_zero(group: str, name: str, value: float) -> None:
    """Raise ConfigError unless value is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{group}.{name} is {value}; expected a finite number > 0")


def between(group: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"{group}.{name} is {value}; expected a number from {low} to {high}")


def below_one(group: str, name: str, value: float) -> None:
    """Raise ConfigError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ConfigError(f"{group}.{name} is {value}; expected a number from 0 to below 1")


def finite(group: str, name: str, value: float) -> None:
    """Raise ConfigError for NaN and infinity."""
    if not math.isfinite(value):
        raise ConfigError(f"{group}.{name} is {value}; expected a finite number")


def to_dict(record: Any) -> dict[str, Any]:
    """A settings record as plain JSON values."""
    return dataclasses.asdict(record)


def from_dict(kind: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """The settings record of type `kind` from plain JSON values; the inverse of `to_dict`.

    Raises:
        ConfigError: an unknown key (the nearest known one is named) or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown setting {where}{key}{nearest(key, known)}")
    return kind(**{k: _value(hints[k], v, where=f"{where}{k}") for k, v in values.items()})


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """'; did you mean X?' for the closest of `known`, or the list of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _value(hint: Any, value: Any, *, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value, where=f"{where}.")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), value, where=where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} is {value!r}; expected one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple and isinstance(value, str) and args == (str, ...):
        return (value,)
    if origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) == len(value):
            pairs = zip(inner, value, strict=True)
            return tuple(_value(a, v, where=where) for a, v in pairs)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool or type(value) is not bool)
    ):
        return value
    raise ConfigError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")
