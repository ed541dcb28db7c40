"""Reading the settings of a config.json: what has to be there, and what would need other graphs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeVar

from tango_plugins import TangoError
from tango_runtime.bundle import MANIFEST, Config
from tango_runtime.util.jsonschema import from_json, shown
from tango_runtime.util.numbers import is_integer, is_number

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

EDIT = "edit config.json"

#: Least and most of a setting. Whatever is larger than any model is refused before a graph of that size is built.
_MOST = 2**24
_RANGES: dict[str, tuple[float, float]] = {
    "num_hidden_layers": (1, 1024),
    "depth": (1, 1024),
    "image_size": (1, 4096),
    "window_size": (1, 4096),
    "rope_theta": (1, 1e12),
    "rms_norm_eps": (1e-12, 1e-2),
    "layer_norm_eps": (1e-12, 1e-2),
}

_Config = TypeVar("_Config", bound="DataclassInstance")


def filled(defaults: _Config, data: dict[str, Any]) -> _Config:
    """A dataclass of dimensions with those of its numbers that a config.json gives.

    Raises:
        TangoError: One of them is no number of its type, or out of range.
    """
    values = asdict(defaults)
    for name in (f.name for f in fields(defaults) if f.name in data and is_number(values[f.name])):
        kind, value = type(values[name]), data[name]
        low, most = _RANGES.get(name, (1, _MOST))
        if not (is_integer(value) or (kind is float and is_number(value))) or not low <= value <= most:
            what = f"a positive {kind.__name__}, from {low} to {most}"
            raise TangoError(f"config.json: {name} is {shown(value)}, not {what}", EDIT)
        values[name] = kind(value)
    return type(defaults)(**values)


def bundle_dimensions(kind: type[_Config], config: Config) -> _Config:
    """The dimensions that a bundle says it was made with, held to the same limits: it may come from a stranger.

    Args:
        kind: The family's dimensions: a dataclass of each part of the model.
        config: ``config`` of the bundle.json.

    Raises:
        TangoError: It is another family's, or a number is out of range.
    """
    where = f"{MANIFEST}: config"
    found = from_json(kind, config, where)
    for name, values in config.items():
        try:
            filled(getattr(found, name), values)
        except TangoError as error:
            problem = error.message.removeprefix("config.json: ")
            raise TangoError(f"{where}: {name}: {problem}", "export the bundle again") from error
    return found


def part(data: dict[str, Any], key: str) -> dict[str, Any]:
    """An object inside of another; an empty one where there is none.

    Raises:
        TangoError: It is something else.
    """
    found = data.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise TangoError(f"config.json: {key} is {shown(found)}, not an object", EDIT)
    return found


def is_set(data: dict[str, Any], key: str) -> bool:
    """Whether a switch is on; a switch that is not there is off.

    Raises:
        TangoError: It is something else.
    """
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise TangoError(f"config.json: {key} is {shown(value)}, not true or false", EDIT)
    return bool(value)


def divides(heads: int, whole: int, key: str) -> None:
    """Rejects a number of heads that does not divide a width."""
    if whole % heads:
        raise TangoError(f"config.json: {key} is {heads}, which does not divide {whole}", EDIT)


def only(data: dict[str, Any], key: str, *values: object) -> None:
    """Rejects a setting that would need another graph."""
    if data.get(key) not in (*values, None):
        raise TangoError(
            f"config.json: {key} is {shown(data[key])}, and only {' or '.join(map(shown, values))} is supported",
            "the released checkpoints have that; is this another model?",
        )


def rope(data: dict[str, Any], *kinds: str, more: Collection[str] = ()) -> dict[str, Any]:
    """The rotary settings, where transformers looks for them; refuses those that need other angles, also by layer.

    Args:
        data: The decoder's settings.
        kinds: What their type may be, besides ``default``.
        more: Keys that the caller reads.
    """
    kept: dict[str, tuple[object, ...]] = {"partial_rotary_factor": (1.0,)}
    kept |= dict.fromkeys(("type", "rope_type"), ("default", *kinds))
    name = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"  # the latter is transformers 5's
    found = part(data, name)
    for key in (key for key in found if key not in ("rope_theta", *more)):
        only({f"{name}: {key}": found[key]}, f"{name}: {key}", *kept.get(key, (None,)))
    return found
