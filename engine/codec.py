"""Frozen dataclasses to JSON values and back, strictly. All our JSON files are read and written by it.

Handles nested dataclasses, enums, tuples, `dict[str, T]`, optionals and JSON scalars. Unknown keys, missing keys and
values of the wrong type are errors that name the place (`manifest.stages[2].macs`). So a damaged or hostile file is
refused before anything uses it. A field that came later (`LATER`) is written only where it is not at its default: so
files, and hashes of them, that do not use it stay as they were.
"""

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
LATER = {"later": True}  # metadata of a field that came after files were written without it
_SCALARS = frozenset({str, bool, int, float, type(None)})
_NAMES: dict[Any, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}


def encode(value: Any) -> Any:
    """Return `value` (dataclasses, enums, tuples, dicts, scalars) as plain JSON values."""
    if type(value) in _SCALARS:  # most are: records of many images come through here
        return value
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return {f.name: encode(item) for f, item in items if not f.metadata.get("later") or item != f.default}
    if isinstance(value, dict):
        return {str(encode(key)): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(cls: type[T], data: Any, where: str, error: Callable[[str], Exception]) -> T:
    """Build a `cls` from JSON values. If they do not fit, the exception is what `error(message)` returns."""
    value: T = _decode(cls, data, where, error)
    return value


def _decode(hint: Any, data: Any, where: str, error: Callable[[str], Exception]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if origin in {typing.Union, types.UnionType}:
        if data is None and type(None) in args:
            return None
        inner = [arg for arg in args if arg is not type(None)]
        if len(inner) == 1:
            return _decode(inner[0], data, where, error)
        fits = isinstance(data, tuple(inner)) and not isinstance(data, bool)  # a union of scalars, such as int | str
        _expect(fits, where, " or ".join(_NAMES.get(arg, str(arg)) for arg in inner), data, error)
        return data
    if origin is tuple:
        _expect(isinstance(data, list | tuple), where, "a list", data, error)
        hints = [args[0]] * len(data) if args[-1] is Ellipsis else list(args)
        _expect(len(data) == len(hints), where, f"{len(hints)} items", data, error)
        return tuple(
            _decode(h, item, f"{where}[{i}]", error) for i, (h, item) in enumerate(zip(hints, data, strict=True))
        )
    if origin is dict:
        _expect(isinstance(data, dict), where, "an object", data, error)
        return {
            _decode(args[0], key, f"{where} key", error): _decode(args[1], item, f"{where}.{shown(key)}", error)
            for key, item in data.items()
        }
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, data, where, error)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        choices = [member.value for member in hint]
        _expect(data in choices, where, f"one of {', '.join(map(str, choices))}", data, error)
        return hint(data)
    if hint is float:
        number = isinstance(data, int | float) and not isinstance(data, bool) and abs(data) <= 1e300
        _expect(number and math.isfinite(data), where, "a finite number", data, error)
        return float(data)
    if hint is int:
        _expect(isinstance(data, int) and not isinstance(data, bool), where, "a whole number", data, error)
        return data
    _expect(isinstance(data, hint), where, _NAMES.get(hint, str(hint)), data, error)
    return data


def _decode_dataclass(hint: Any, data: Any, where: str, error: Callable[[str], Exception]) -> Any:
    _expect(isinstance(data, dict), where, "an object", data, error)
    fields = {f.name: f for f in dataclasses.fields(hint)}
    if unknown := sorted(set(data) - set(fields)):
        raise error(f"{where} has unknown entries: {', '.join(map(shown, unknown[:8]))}")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(data)):
        raise error(f"{where} lacks {', '.join(map(repr, missing))}")
    hints = _type_hints(hint)
    return hint(**{name: _decode(hints[name], item, f"{where}.{name}", error) for name, item in data.items()})


@functools.cache  # resolving annotations takes longer than checking a record against them
def _type_hints(hint: Any) -> dict[str, Any]:
    return typing.get_type_hints(hint)


def _expect(ok: bool, where: str, what: str, data: Any, error: Callable[[str], Exception]) -> None:
    if not ok:
        raise error(f"{where} must be {what}, not {shown(data)}")


def shown(value: Any) -> str:
    """Return a value from a file as an error message can quote it: short, on one line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge number"
    return f"{text[:60]}…" if len(text) > 60 else text
