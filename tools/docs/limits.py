"""The limits that users meet, with the values that the code has."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tango_runtime.server.settings import Settings
from tools.docs import bundle_format, c_api
from tools.docs.markdown import code, table


def count(value: float) -> str:
    """A plain number."""
    return f"{value:,}"


def size(value: float) -> str:
    """A number of bytes, in powers of two."""
    units = {1 << 30: "GiB", 1 << 20: "MiB", 1 << 10: "KiB", 1: "bytes"}
    unit, name = next((unit, name) for unit, name in units.items() if value >= unit)
    return f"{value / unit:g} {name}"


def seconds(value: float) -> str:
    """A time."""
    return f"{value:g} s"


def share(value: float) -> str:
    """A share."""
    return f"{100 * value:g} %"


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit.

    Attributes:
        what: What is limited.
        where: ``module:NAME``, where NAME may be a field of a dataclass; or ``header.h:NAME``.
        show: Writes the value.
        note: What else there is to know; empty for nothing.
    """

    what: str
    where: str
    show: Callable[[float], str] = count
    note: str = ""

    @property
    def value(self) -> float:
        """The value that the code has."""
        return value_at(self.where)


LIMITS = {
    "video": (
        Limit(
            "steps of frames in a video",
            "prune.h:TANGO_MAX_FRAMES",
            note="on a GPU; a step is one frame, or two with Qwen2.5-VL",
        ),
        Limit("tokens of a step", "prune.h:TANGO_MAX_TOKENS_PER_FRAME", note="on a GPU"),
        Limit("pixels of a frame of a video file", "tango_runtime.video.container:MAX_PIXELS", note="8192×8192"),
        Limit("pixels of a frame of a live stream", "tango_runtime.video.stream:MAX_PIXELS", note="4096×4096"),
        Limit("aspect ratio of a frame", "tango_runtime.video.shape:_MAX_ASPECT", note="for models that keep it"),
        Limit("pixels along a side in `tango bench --source-size`", "tango_runtime.cli.bench:_MAX_PIXELS"),
    ),
    "operator": (
        Limit("width D of a token, which must be even", "prune.h:TANGO_MAX_WIDTH"),
        Limit("neighbors k of DPC-KNN", "prune.h:TANGO_MAX_NEIGHBORS"),
        Limit("frames of a segment", "tango_plugins.reference:MAX_WINDOW", note="longer ones are split"),
        Limit(
            "steps between 0 and 1 of a ratio or cosine",
            "tango_plugins.params:RATIO_SCALE",
            note="that is, four decimals",
        ),
        Limit(
            "bytes of the matrix of inner products",
            "tango_runtime.sizing.memory:MAX_PRODUCTS_BYTES",
            note="larger ones are computed in strips",
        ),
    ),
    "prompt": (
        Limit("positions of a bundle's context", "tango_runtime.bundle.manifest:DecoderSpec.context"),
        Limit(
            "positions that the default context reserves for the answer", "tango_runtime.sizing.memory:ANSWER_TOKENS"
        ),
        Limit(
            "text tokens that one prefill pass has space for",
            "tango_runtime.sizing.memory:MAX_TEXT_TOKENS",
            note="a longer question costs another pass",
        ),
    ),
    "kernels": (
        Limit(
            "divisor of hidden_size, head_dim, intermediate size and columns of the LM head",
            "tango_plugins.decoder:DIM_MULTIPLE",
        ),
        Limit("head_dim of a decoder", "attention.h:TANGO_MAX_HEAD_DIM"),
        Limit("heads / kv_heads · head_dim of a decoder", "tango_plugins.decoder:MAX_GROUP_WIDTH"),
        Limit("head_dim of a vision tower", "vision_attention.h:TANGO_MAX_VISION_HEAD_DIM"),
        Limit("patches along a side of an attention window", "vision_attention.h:TANGO_MAX_VISION_WINDOW"),
        Limit("patches of an attention window with rotation", "vision_attention.h:TANGO_MAX_ROTATED_WINDOW"),
        Limit("width of a row in a norm", "norm.h:TANGO_MAX_NORM_WIDTH"),
    ),
    "bundle": (
        Limit("alignment of weights in a data file, in bytes", "tango_runtime.bundle.manifest:WEIGHT_ALIGNMENT"),
        Limit("characters of a chat template", "tango_runtime.pipeline.chat_template:_LONGEST"),
        Limit("characters of a rendered chat", "tango_runtime.pipeline.render:_LONGEST"),
        Limit("processor time to render a template", "tango_runtime.pipeline.chat_template:_PROCESSOR_S", seconds),
        Limit("wall-clock time to render a template", "tango_runtime.pipeline.chat_template:_IN_ALL_S", seconds),
        Limit("memory to render a template", "tango_runtime.pipeline.chat_template:_MEMORY", size),
    ),
    "checks": (
        Limit("minimum cosine that `tango validate` accepts", "tango_export.validate:MIN_COSINE"),
        Limit("maximum error of the norm that it accepts", "tango_export.validate:MAX_NORM_ERROR", share),
        Limit("minimum number of clips for `tango calibrate`", "tango_calibration.quantization.clips:MIN_CLIPS"),
        Limit("minimum number of frames of a generated clip", "tango_calibration.data.dataset:MIN_FRAMES"),
    ),
    "request": (
        Limit("messages of a chat", "tango_runtime.server.chat:_MESSAGES"),
        Limit("stop texts", "tango_runtime.server.chat:_STOPS"),
        Limit("characters of text", "tango_runtime.server.chat:_TEXT"),
        Limit("pixels of a frame or an image", "tango_runtime.server.decoder:_MAX_PIXELS"),
    ),
}

#: The options of `tango serve`, by the setting that each of them sets.
OPTIONS = {
    "waiting": "--queue",
    "together": "--together",
    "videos": "--cache-videos",
    "sessions": "--cache-sessions",
    "streams": "--streams",
}


def section(name: str) -> str:
    """The table of a group of limits."""
    rows = [(limit.what, limit.show(limit.value), limit.note, code(limit.where)) for limit in LIMITS[name]]
    return table(("limit", "value", "note", "set in"), rows)


def server() -> str:
    """The settings of a server."""
    meanings = bundle_format.meanings(Settings)
    fields = [field for field in dataclasses.fields(Settings) if field.type in ("int", "float")]
    options = {f.name: code(OPTIONS[f.name]) if f.name in OPTIONS else "" for f in fields}
    rows = [(code(f.name), _plain(meanings[f.name]), _setting(f, meanings[f.name]), options[f.name]) for f in fields]
    return table(("setting", "meaning", "default", "option"), rows)


def value_at(where: str) -> float:
    """The value of a name in a module or a header; of a field, its default or the highest that its type allows."""
    place, _, path = where.partition(":")
    if place.endswith(".h"):
        return c_api.constant(place, path)
    holder, *rest = path.split(".")
    found: Any = getattr(importlib.import_module(place), holder)
    return _field(found, rest[0]) if rest else found


def _field(kind: type[Any], name: str) -> float:
    hint = get_type_hints(kind, include_extras=True)[name]
    assert get_origin(hint) is Annotated, f"{kind.__name__}.{name} has no range"
    high: float = get_args(hint)[1].high
    return high


def _plain(meaning: str) -> str:
    """A meaning with "Maximum" for a leading "Most"."""
    return re.sub(r"^Most (?!time\b)", "Maximum number of ", meaning).replace("Most time", "Maximum time").rstrip(".")


def _setting(field: dataclasses.Field[Any], meaning: str) -> str:
    default: Any = field.default
    if field.name.endswith("_seconds"):
        return seconds(default)
    return (size if re.search(r"\bbytes\b", meaning) else count)(default)
