"""config.json of a Qwen2.5-VL checkpoint: the hub's, with the decoder's keys beside all others, or nested ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tango_export.checkpoint import read_json
from tango_export.families.settings import EDIT, divides, filled, is_set, only, part, rope
from tango_export.models.qwen2 import MRopeConfig
from tango_export.models.qwen_vision import QwenVisionConfig
from tango_plugins import TangoError
from tango_runtime.util.jsonschema import shown

#: Relatives, whose graphs are others, by ``model_type``.
_OTHERS = {
    "qwen2_vl": "Qwen2-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL",
    "qwen2_5_omni": "Qwen2.5-Omni",
}

#: Keys of the decoder that no file leaves out: no release has the values that transformers takes for them.
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Dimensions:
    """What the graphs depend on.

    Attributes:
        vision: The tower and its merger.
        text: The decoder.
    """

    vision: QwenVisionConfig
    text: MRopeConfig


@dataclass(frozen=True)
class QwenConfig(Dimensions):
    """What config.json says that matters here.

    Attributes:
        tokens_per_second: Ids on the time axis for one second.
        tied: The head may be absent: it is then the embedding table.
        eos: ``eos_token_id``.
    """

    tokens_per_second: int
    tied: bool
    eos: object


def read_config(folder: Path) -> QwenConfig:
    """Reads config.json.

    What a file leaves out is what the released checkpoints have: files of older versions of transformers lack what
    equalled its defaults of then, and its defaults of today are those of no release.

    Raises:
        TangoError: The model is of another kind, or needs something that the graphs do not do.
    """
    data = read_json(folder / "config.json")
    kind = str(data.get("model_type", "nameless"))
    if kind != "qwen2_5_vl":
        raise TangoError(
            f"{folder} is a {_OTHERS.get(kind, kind)} model, not Qwen2.5-VL",
            "name a checkpoint of Qwen2.5-VL, or the family that it is of: --model",
        )
    nested = part(data, "text_config")
    text = _text_config({**data, **nested})
    vision = part(data, "vision_config")
    tower = _vision_config(vision, text.hidden_size)
    rate = filled(_Rate(), vision).tokens_per_second
    tied = is_set(data, "tie_word_embeddings") or is_set(nested, "tie_word_embeddings")
    return QwenConfig(tower, text, rate, tied, nested.get("eos_token_id", data.get("eos_token_id")))


@dataclass(frozen=True)
class _Rate:
    tokens_per_second: int = 2


def _text_config(data: dict[str, Any]) -> MRopeConfig:
    for key in _REQUIRED:
        if data.get(key) is None:
            raise TangoError(f"config.json has no {key}", "take config.json from the checkpoint on the hub")
    only(data, "hidden_act", "silu")
    only(data, "use_sliding_window", False)
    only(data, "partial_rotary_factor", 1.0)
    rotary = rope(data, "mrope", more=("mrope_section",))
    defaults = MRopeConfig(1, 1, 1, 1, 1, 152064, max_position_embeddings=128000, mrope_section=_sections(rotary))
    config = filled(defaults, {**data, **rotary})
    only(data, "rope_theta", config.rope_theta)
    only(data, "layer_types", ["full_attention"] * config.num_hidden_layers)
    divides(config.num_attention_heads, config.hidden_size, "num_attention_heads")
    divides(config.num_key_value_heads, config.num_attention_heads, "num_key_value_heads")
    only(data, "head_dim", config.head_dim)
    if 2 * sum(config.mrope_section) != config.head_dim:
        raise TangoError(
            f"config.json: mrope_section is {list(config.mrope_section)}, whose sum is not half of a head's width, "
            f"{config.head_dim}",
            EDIT,
        )
    return config


def _sections(rope: dict[str, Any]) -> tuple[int, int, int]:
    found = rope.get("mrope_section", [16, 24, 24])
    if not isinstance(found, list) or len(found) != 3 or not all(type(n) is int and n > 0 for n in found):
        raise TangoError(f"config.json: mrope_section is {shown(found)}, not three positive integers", EDIT)
    return found[0], found[1], found[2]


def _vision_config(data: dict[str, Any], width: int) -> QwenVisionConfig:
    for key, value in {
        "hidden_act": "silu",
        "in_chans": 3,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": width,
    }.items():
        only(data, key, value)
    rotary = part(data, "rope_parameters")
    only(rotary, "rope_type", "axial", "default")
    only(rotary, "rope_theta", 10000)
    defaults = QwenVisionConfig(32, 1280, 16, 3420, width, 14, 2, 2, 112, ())
    config = filled(defaults, data)
    divides(config.num_heads, config.hidden_size, "num_heads")
    if config.head_dim % 4 or config.window_size % config.token_size:
        raise TangoError(
            f"config.json: vision_config: heads are {config.head_dim} wide, windows {config.window_size} pixels",
            f"a width must be a multiple of 4, and a window of {config.token_size}",
        )
    return replace(config, fullatt_block_indexes=_whole_layers(data, config.depth))


def _whole_layers(data: dict[str, Any], depth: int) -> tuple[int, ...]:
    """Layers whose attention has no windows; the last is one of them, since the salience is its attention."""
    found = data.get("fullatt_block_indexes", [7, 15, 23, 31])
    layers = found if isinstance(found, list) and all(type(n) is int for n in found) else []
    if depth - 1 not in layers or not all(0 <= n < depth for n in layers):
        raise TangoError(
            f"config.json: fullatt_block_indexes is {shown(found)}, not some of {depth} layers and the last of them",
            "the released checkpoints have that; is this another model?",
        )
    return tuple(layers)
