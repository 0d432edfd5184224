"""Strict JSON for frozen dataclasses: what is written can be read back, and nothing else can.

Artifacts come from disk, so every field is checked: a missing key, an unknown key, a wrong type
or a number that is not finite is an `ArtifactError` that names the place, never a `KeyError`.
"""

from __future__ import annotations

import json
import math
import types
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .errors import ArtifactError

T = TypeVar("T")
_UNIONS = (Union, types.UnionType)
_WORDS = {str: "a string", int: "an integer", float: "a finite number", bool: "true or false"}


def dumps(record: Any, *, indent: int | None = None) -> str:
    """A dataclass as JSON text. Numbers that JSON does not have (NaN, inf) raise ValueError."""
    return json.dumps(asdict(record), indent=indent, allow_nan=False)


def parse(text: str | bytes) -> Any:
    """JSON text as plain lists and dicts.

    Raises:
        ArtifactError: not JSON, a key twice in one object, or NaN or Infinity.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:  # JSONDecodeError and UnicodeDecodeError included
        raise ArtifactError(f"not valid JSON: {e}") from e


def loads(cls: type[T], text: str | bytes) -> T:
    """JSON text as a `cls`.

    Raises:
        ArtifactError: anything `parse` or `decode` refuses.
    """
    return decode(cls, parse(text))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def decode(cls: type[T], data: Any, where: str = "") -> T:
    """Build the dataclass `cls` from parsed JSON.

    Args:
        cls: a frozen dataclass whose fields are str, int, float, bool, ``X | None``,
            ``tuple[X, ...]``, ``Literal[...]``, ``dict[str, Any]`` or such dataclasses.
        data: what `json.loads` returned.
        where: the path to show in messages, e.g. ``"report.layers[2]"``.

    Raises:
        ArtifactError: a key is missing or unknown, a value has the wrong type, or the
            dataclass refuses the values (its ``__post_init__`` raised ValueError).
    """
    if not isinstance(data, dict):
        raise _wrong(where, "an object", data)
    names = {f.name for f in fields(cast(Any, cls))}
    for problem, keys in (("missing", names - data.keys()), ("unknown", data.keys() - names)):
        if keys:
            raise ArtifactError(f"{where or cls.__name__}: {problem} {', '.join(sorted(keys))}")
    hints = _hints(cast(Any, cls))
    prefix = f"{where}." if where else ""
    values = {name: _value(hints[name], data[name], prefix + name) for name in names}
    try:
        return cls(**values)
    except ValueError as e:
        raise ArtifactError(f"{where or cls.__name__}: {e}") from e


def _wrong(where: str, expected: str, got: Any) -> ArtifactError:
    shown = repr(got)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return ArtifactError(f"{where or 'document'}: expected {expected}, got {shown}")


def _value(hint: Any, data: Any, where: str) -> Any:
    origin = get_origin(hint)
    if is_dataclass(hint):
        return decode(cast(type, hint), data, where)
    if origin is tuple:
        return _tuple(get_args(hint), data, where)
    if origin is dict:
        if not isinstance(data, dict):
            raise _wrong(where, "an object", data)
        return data
    if origin is Literal:
        if data not in get_args(hint):
            raise _wrong(where, f"one of {', '.join(map(repr, get_args(hint)))}", data)
        return data
    if origin in _UNIONS:
        return None if data is None else _value(get_args(hint)[0], data, where)
    return _scalar(hint, data, where)


def _tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise _wrong(where, "a list", data)
    return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))


def _scalar(hint: type, data: Any, where: str) -> Any:
    if hint is float and type(data) in (int, float):
        # 1e999 parses as infinity, and an integer may be too long for a float.
        if abs(data) > 1e300 or not math.isfinite(data):
            raise _wrong(where, _WORDS[float], data)
        return float(data)
    if type(data) is not hint:  # `is`: True must not pass as an int
        raise _wrong(where, _WORDS[hint], data)
    return data
