"""config.json of a LLaVA checkpoint, in the format of Hugging Face (llava-hf) or of lmms-lab."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from tango_export.checkpoint import read_json
from tango_export.models.qwen2 import Qwen2Config
from tango_export.models.siglip import SiglipConfig
from tango_plugins import TangoError
from tango_runtime.bundle import Config
from tango_runtime.util.jsonschema import from_json, shown
from tango_runtime.util.numbers import is_integer, is_number

_EDIT = "edit config.json"

#: Least and most of a setting. Whatever is larger than any model is refused before a graph of that size is built.
_MOST, _MOST_SIDE = 2**24, 64
_RANGES: dict[str, tuple[float, float]] = {
    "num_hidden_layers": (1, 1024),
    "image_size": (1, 4096),
    "rope_theta": (1, 1e12),
    "rms_norm_eps": (1e-12, 1e-2),
    "layer_norm_eps": (1e-12, 1e-2),
}

#: What transformers' Qwen2Config takes where a file leaves a key out.
QWEN2_DEFAULTS = Qwen2Config(4096, 22016, 32, 32, 32, 151936, rope_theta=10000.0)

#: Models that are taken for a LLaVA of these families: what config.json calls them, and their names.
_OTHERS = {
    "llava_next_video": "LLaVA-NeXT-Video",
    "llava_next": "LLaVA-NeXT",
    "llava_llama": "LLaVA with a Llama decoder",
    "llava_mistral": "LLaVA with a Mistral decoder",
    "video_llava": "Video-LLaVA",
    "llavaonevision1_5": "LLaVA-OneVision-1.5",
    "llava_onevision1_5": "LLaVA-OneVision-1.5",
    "llava_onevision": "LLaVA-OneVision",
}

#: Which family's newline goes where, by ``mm_newline_position``.
_NEWLINES = {"one_token": "llava-ov", "grid": "llava-video"}


@dataclass(frozen=True)
class Formats:
    """What tells a family's config.json from those of other models.

    Attributes:
        title: Name of the family.
        hf: ``model_type`` in Hugging Face's format; None where there is no such format.
        newline: ``mm_newline_position`` in lmms-lab's format.
        lmms_lab: Other settings in lmms-lab's format, and the values that the graphs are written for.
        text: What the decoder is where a file in lmms-lab's format leaves a key out.
    """

    title: str
    hf: str | None
    newline: Literal["one_token", "grid"]
    lmms_lab: Mapping[str, object]
    text: Qwen2Config = QWEN2_DEFAULTS


@dataclass(frozen=True)
class Dimensions:
    """What the graphs depend on.

    Attributes:
        vision: The tower; ``num_hidden_layers`` counts the layers that LLaVA keeps.
        text: The decoder.
    """

    vision: SiglipConfig
    text: Qwen2Config


@dataclass(frozen=True)
class LlavaConfig(Dimensions):
    """What config.json says that matters here.

    Attributes:
        tied: The head may be absent: it is then the embedding table.
        lmms_lab: The file is in lmms-lab's format.
        eos: ``eos_token_id``.
    """

    tied: bool
    lmms_lab: bool
    eos: object


def read_config(checkpoint: Path, siglip: Path, formats: Formats) -> LlavaConfig:
    """Reads config.json in either format.

    Args:
        checkpoint: The checkpoint's folder.
        siglip: SigLIP's folder; lmms-lab's format leaves the tower's dimensions to it.
        formats: The family's.

    Raises:
        TangoError: The model is of another kind, or needs something that the graphs do not do.
    """
    data = read_json(checkpoint / "config.json")
    if "mm_vision_tower" in data:
        return _lmms_lab_config(data, siglip, formats)
    if formats.hf is not None and data.get("model_type") == formats.hf:
        return _hf_config(data)
    kind = str(data.get("model_type", "nameless"))
    raise TangoError(
        f"{checkpoint} is {_OTHERS.get(kind, f'a {kind} model')} ({kind}), not {formats.title}",
        f"name a checkpoint of {formats.title}{'' if formats.hf else ' in the format of lmms-lab'}",
    )


def bundle_dimensions(config: Config, where: str) -> Dimensions:
    """The dimensions that a bundle says it was made with, held to the limits of config.json's.

    Args:
        config: ``config`` of its bundle.json.
        where: What to call that in errors.

    Raises:
        TangoError: It is another family's, or a number is out of range.
    """
    found = from_json(Dimensions, config, where)
    try:
        _siglip_config(asdict(found.vision))
        _qwen2_config(asdict(found.text), QWEN2_DEFAULTS)
    except TangoError as error:
        problem = error.message.removeprefix("config.json: ")
        raise TangoError(f"{where}: {problem}", "export the bundle again") from error
    return found


def _hf_config(data: dict[str, Any]) -> LlavaConfig:
    text, vision = _part(data, "text_config"), _part(data, "vision_config")
    _only(text, "model_type", "qwen2")
    _only(vision, "model_type", "siglip_vision_model")
    _only(data, "vision_feature_layer", -1)
    _only(data, "vision_feature_select_strategy", "full")
    _only(data, "projector_hidden_act", "gelu")
    _only(data, "multimodal_projector_bias", True)
    tied = _is_set(data, "tie_word_embeddings") or _is_set(text, "tie_word_embeddings")
    return LlavaConfig(
        _siglip_config(vision), _qwen2_config(text, QWEN2_DEFAULTS), tied, False, text.get("eos_token_id")
    )


def _lmms_lab_config(data: dict[str, Any], siglip: Path, formats: Formats) -> LlavaConfig:
    _only(data, "architectures", ["LlavaQwenForCausalLM"])
    _only(data, "mm_projector_type", "mlp2x_gelu")
    _only(data, "mm_use_im_start_end", False)
    _only(data, "mm_use_im_patch_token", False)
    _only(data, "mm_resampler_type", None)
    newline = data.get("mm_newline_position") or "one_token"  # as LLaVA-NeXT's code takes it
    if newline != formats.newline:
        family = _NEWLINES.get(str(newline))
        raise TangoError(
            f"config.json: mm_newline_position is {newline!r}, {formats.title} has {formats.newline!r}",
            f"another model says so: try --model {family}" if family else "the released checkpoints have that",
        )
    for key, value in formats.lmms_lab.items():
        _only(data, key, value)
    source = read_json(siglip / "config.json")
    tower = _siglip_config(_part(source, "vision_config") or source, dropped_layers=1)
    # The head's absence is what ties it: some of these files lack tie_word_embeddings or deny it.
    return LlavaConfig(tower, _qwen2_config(data, formats.text), True, True, data.get("eos_token_id"))


def _siglip_config(data: dict[str, Any], dropped_layers: int = 0) -> SiglipConfig:
    _only(data, "hidden_act", "gelu_pytorch_tanh")
    _only(data, "num_channels", 3)
    # What a file leaves out is transformers' SiglipVisionConfig default.
    defaults = SiglipConfig(768, 3072, 12, 12, image_size=224, patch_size=16)
    config = _filled(defaults, data)
    _divides(config.num_attention_heads, config.hidden_size, "num_attention_heads")
    if not 2 <= config.side <= _MOST_SIDE:  # pooling halves it, by a matrix that grows with its fourth power
        where = f"image_size {config.image_size} and patch_size {config.patch_size}"
        raise TangoError(f"config.json: {where} give {config.side} patches a side, not 2 to {_MOST_SIDE}", _EDIT)
    return _filled(config, {"num_hidden_layers": config.num_hidden_layers - dropped_layers})


def _qwen2_config(data: dict[str, Any], defaults: Qwen2Config) -> Qwen2Config:
    _only(data, "hidden_act", "silu")
    _only(data, "use_sliding_window", False)
    _only(data, "partial_rotary_factor", 1.0)
    config = _filled(defaults, {**data, **_rope(data)})
    _only(data, "rope_theta", config.rope_theta)
    _only(data, "layer_types", ["full_attention"] * config.num_hidden_layers)
    _divides(config.num_attention_heads, config.hidden_size, "num_attention_heads")
    _divides(config.num_key_value_heads, config.num_attention_heads, "num_key_value_heads")
    _only(data, "head_dim", config.head_dim)
    return config


_Config = TypeVar("_Config", SiglipConfig, Qwen2Config)


def _filled(defaults: _Config, data: dict[str, Any]) -> _Config:
    values = asdict(defaults)
    for name in (f.name for f in fields(defaults) if f.name in data):
        kind, value = type(values[name]), data[name]
        low, most = _RANGES.get(name, (1, _MOST))
        if not (is_integer(value) or (kind is float and is_number(value))) or not low <= value <= most:
            what = f"a positive {kind.__name__}, from {low} to {most}"
            raise TangoError(f"config.json: {name} is {shown(value)}, not {what}", _EDIT)
        values[name] = kind(value)
    return type(defaults)(**values)


def _part(data: dict[str, Any], key: str) -> dict[str, Any]:
    part = data.get(key)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise TangoError(f"config.json: {key} is {shown(part)}, not an object", _EDIT)
    return part


def _is_set(data: dict[str, Any], key: str) -> bool:
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise TangoError(f"config.json: {key} is {shown(value)}, not true or false", _EDIT)
    return bool(value)


def _divides(heads: int, whole: int, key: str) -> None:
    if whole % heads:
        raise TangoError(f"config.json: {key} is {heads}, which does not divide {whole}", _EDIT)


def _rope(data: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, where transformers looks for them; refuses those that need other angles, also by layer."""
    plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    name = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"  # the latter is transformers 5's
    rope = _part(data, name)
    for key in rope:
        if key != "rope_theta":
            _only({f"{name}: {key}": rope[key]}, f"{name}: {key}", plain.get(key))
    return rope


def _only(data: dict[str, Any], key: str, value: object) -> None:
    """Refuses a setting that would need another graph."""
    if data.get(key, value) not in (value, None):
        raise TangoError(
            f"config.json: {key} is {shown(data[key])}, and only {shown(value)} is supported",
            "the released checkpoints have that; is this another model?",
        )
