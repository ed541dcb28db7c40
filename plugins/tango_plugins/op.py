"""The operator as plain data: its name, its attributes, its capacity.

ONNX nodes, TensorRT plugins, the C interface and bundle.json hold the parameters in this form. Each attribute has the
name of a field of :class:`PruneParams`:

====================  ===========  =========================================
attribute             type         unit
====================  ===========  =========================================
``retention_ratio``   int          ten-thousandths
``context_ratio``     int          ten-thousandths
``expansion``         int          ten-thousandths
``anchor_weight``     int          ten-thousandths
``segment_threshold`` int          ten-thousandths of a cosine
``static_threshold``  int          ten-thousandths of a cosine
``neighbors``         int
``time_base``         int
``space_base``        int
``grid``              list of int  [H, W]
``sink_positions``    list of int  row-major grid positions, may be empty
``merge_order``       str          ``anchor`` or ``density``
``budget``            str          ``paper`` or ``exact``
====================  ===========  =========================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from tango_plugins.errors import TangoError
from tango_plugins.params import RATIO_SCALE, RATIOS, PruneParams

NAME = "TangoPrune"
DOMAIN = "tango"
VERSION = "1"

#: Attributes of every ONNX node of the domain: TensorRT's parser takes the namespace from the domain only since 10.10.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": VERSION}

#: In the order of the ONNX node and the plugin.
INPUTS = ("features", "salience", "timestamps")
OUTPUTS = ("tokens", "indices", "count")

#: Inner products of rotated features in the CUDA library: ``fast`` rounds features to fp16, ``exact`` splits them.
Precision = Literal["fast", "exact"]

Attribute = int | list[int] | str

_WHOLES = ("neighbors", "time_base", "space_base")
_LISTS = ("grid", "sink_positions")
_NAMES = ("merge_order", "budget")


def attributes(params: PruneParams) -> dict[str, Attribute]:
    """The parameters as attributes. A parameter that is None follows its rule and is left out.

    ``decoder_share`` is not an attribute. It belongs to the decoder, and :meth:`PruneParams.resolved` accounts for it.
    """
    ratios = {name: getattr(params, name) for name in RATIOS}
    found: dict[str, Attribute] = {n: round(value * RATIO_SCALE) for n, value in ratios.items() if value is not None}
    found |= {name: int(getattr(params, name)) for name in _WHOLES}
    found |= {name: list(getattr(params, name)) for name in _LISTS if getattr(params, name) is not None}
    found |= {name: getattr(params, name) for name in _NAMES}
    return found


def node_attributes(params: PruneParams, precision: Precision = "fast") -> dict[str, Attribute]:
    """All attributes of an ONNX node, for a host that knows no rules and no model.

    The segment threshold and the sink positions are always written out.

    Args:
        params: Parameters of the operator.
        precision: Inner products of the CUDA library, ``fast`` or ``exact``.
    """
    return attributes(params.resolved()) | {"precision": precision} | PLUGIN_ATTRIBUTES


def params_from(found: Mapping[str, Attribute]) -> PruneParams:
    """The parameters from attributes. A missing attribute takes the default of its field.

    Raises:
        TangoError: An attribute is unknown, of the wrong type, or holds a value out of range.
    """
    return PruneParams(**{name: _field(name, value) for name, value in found.items()})


def capacity(frames: int, tokens_per_frame: int, params: PruneParams) -> int:
    """The maximum number of tokens that the operator can keep, which is the size of its outputs.

    In integers, so that every host agrees: min(F·L, F·L·p div q + 2·F), r = p/q. It is the bound of the paper's
    selection for either budget, because ``exact`` starts from that selection.

    Args:
        frames: F.
        tokens_per_frame: L.
        params: Parameters of the operator.
    """
    tokens = frames * tokens_per_frame
    return min(tokens, tokens * round(params.operator_ratio * RATIO_SCALE) // RATIO_SCALE + 2 * frames)


def exact_count(frames: int, tokens_per_frame: int, params: PruneParams) -> int:
    """The number of tokens that ``budget="exact"`` keeps: ceil(r·F·L), in fp64, multiplied from left to right."""
    return math.ceil(params.operator_ratio * frames * tokens_per_frame)


def _field(name: str, value: Attribute) -> Any:
    if name in RATIOS or name in _WHOLES:
        if isinstance(value, int) and not isinstance(value, bool):
            return value / RATIO_SCALE if name in RATIOS else value
        raise TangoError(f"attribute {name} is {value!r}", "it must be an integer")
    if name in _LISTS:
        if isinstance(value, (list, tuple)):
            return tuple(value)
        raise TangoError(f"attribute {name} is {value!r}", "it must be a list of integers")
    if name in _NAMES:
        return value
    raise TangoError(
        f"{NAME} has no attribute {name}", f"its attributes are {', '.join(RATIOS + _WHOLES + _LISTS + _NAMES)}"
    )
