"""Reads a stranger's JSON, and converts it to dataclasses: fields are keys, annotations are types."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tango_plugins import TangoError
from tango_runtime.util.errors import first_line

_T = TypeVar("_T")

_UNDO = "export the bundle again, or undo the edit"


@dataclass(frozen=True)
class Range:
    """What a number may be: ``Annotated[int, Range(1, 64)]`` is the type of a field from 1 to 64."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}"


def parse_json(content: str | bytes, where: str, hint: str) -> Any:
    """Parses JSON.

    Args:
        content: The JSON; bytes are UTF-8.
        where: Its name in errors, such as a file and a line.
        hint: The hint of errors.

    Raises:
        TangoError: It is not UTF-8 or not JSON, is nested too deeply, or has an integer of thousands of digits or an
            object with a key twice.
    """
    try:
        return json.loads(content if isinstance(content, str) else content.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # the errors of Unicode, of JSON and of int() are ValueErrors
        raise TangoError(f"{where} is not JSON: {first_line(error)}", hint) from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's dict, for ``json.loads(…, object_pairs_hook=unique_keys)``.

    Raises:
        ValueError: A key is there twice: another reader could take the other value.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"an object has the key {shown(twice)} twice")
    return found


def from_json(kind: type[_T], data: object, where: str) -> _T:
    """Converts parsed JSON to a value of an annotated type.

    Args:
        kind: A dataclass: its fields are the keys, and those with a default are optional. A dict: if its keys are a
            Literal, no others are allowed. Or int, float, str, bool, Literal, tuple, list, and unions of these; a
            number may be annotated with its :class:`Range`, and a float is finite in any case.
        data: The result of ``json.loads``.
        where: Its name in errors, such as ``bundle.json: decoder``.

    Raises:
        TangoError: A key is missing or unknown, or a value has the wrong type or is out of range; the message says
            where.
    """
    try:
        value: _T = _convert(kind, data, where)
    except RecursionError as error:
        raise TangoError(f"{where} is nested too deeply", _UNDO) from error
    return value


def _convert(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        number, allowed = _convert(arguments[0], data, where), arguments[1]
        if not allowed.low <= number <= allowed.high:
            raise _wrong_type(kind, data, where)
        return number
    if is_dataclass(kind) and isinstance(kind, type):
        return _convert_dataclass(kind, data, where)
    if origin in (Union, UnionType):
        return _convert_union(arguments, data, where)
    if origin is Literal:
        if any(data == value and type(data) is type(value) for value in arguments):  # true is not 1
            return data
    elif origin is tuple and isinstance(data, list):
        kinds = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(data):
            return tuple(
                _convert(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, data, strict=True))
            )
    elif origin is list and isinstance(data, list):
        return [_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data)]
    elif origin is dict and isinstance(data, dict):
        if get_origin(arguments[0]) is Literal:
            _check_keys(data, get_args(arguments[0]), where, get_args(arguments[0]))
        return {key: _convert(arguments[1], item, f"{where}: {key}") for key, item in data.items()}
    elif type(data) is kind and (kind is not float or math.isfinite(data)):
        return data
    raise _wrong_type(kind, data, where)


def _convert_dataclass(kind: type, data: object, where: str) -> object:
    if not isinstance(data, dict):
        raise _wrong_type(kind, data, where)
    hints = get_type_hints(kind, include_extras=True)
    known = fields(kind)
    _check_keys(data, [f.name for f in known], where, [f.name for f in known if f.default is not MISSING])
    return kind(**{name: _convert(hints[name], data[name], f"{where}: {name}") for name in data})


def _check_keys(data: Collection[str], names: Collection[str], where: str, optional: Collection[str] = ()) -> None:
    for key in data:
        if key not in names:
            raise TangoError(f"{where} has an unknown key {key!r}", "export the bundle again with this tango-edge")
    for name in names:
        if name not in data and name not in optional:
            raise TangoError(f"{where} has no {name!r}", "export the bundle again with this tango-edge")


def _convert_union(kinds: tuple[Any, ...], data: object, where: str) -> object:
    for kind in kinds:
        if _accepts(kind, data):
            return _convert(kind, data, where)
    raise _wrong_type(" or ".join(map(_name, kinds)), data, where)


def _accepts(kind: Any, data: object) -> bool:
    if get_origin(kind) is Annotated:
        return _accepts(get_args(kind)[0], data)
    if get_origin(kind) is Literal:
        return data in get_args(kind)
    return type(data) is (dict if is_dataclass(kind) else get_origin(kind) or kind)


def _wrong_type(kind: Any, data: object, where: str) -> TangoError:
    return TangoError(f"{where} is {shown(data)}, not {_name(kind)}", _UNDO)


def shown(data: object, limit: int = 60) -> str:
    """A parsed value as JSON, cut to ``limit`` characters."""
    try:
        text = json.dumps(data)
    except RecursionError:
        text = "a value that is nested too deeply"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _name(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    if get_origin(kind) is Annotated:
        return f"{_name(get_args(kind)[0])} {get_args(kind)[1]}"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if is_dataclass(kind):
        return "an object"
    words = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false", type(None): "null"}
    words |= {tuple: "a list", list: "a list", dict: "an object"}
    return words.get(get_origin(kind) or kind, str(kind))
