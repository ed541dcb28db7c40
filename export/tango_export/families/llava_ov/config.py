"""config.json of LLaVA-OneVision, in the format of Hugging Face (llava-hf) or of lmms-lab."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from tango_export.checkpoint import read_json
from tango_export.modules.qwen2 import Qwen2Config
from tango_export.modules.siglip import SiglipConfig
from tango_plugins import TangoError


@dataclass(frozen=True)
class LlavaOvConfig:
    """What config.json says that matters here.

    Attributes:
        vision: The tower; ``num_hidden_layers`` counts the layers that LLaVA keeps.
        text: The decoder.
        tied: The head may be absent: it is then the embedding table.
        lmms_lab: The file is in lmms-lab's format.
        eos: ``eos_token_id``.
    """

    vision: SiglipConfig
    text: Qwen2Config
    tied: bool
    lmms_lab: bool
    eos: object


def read_config(checkpoint: Path, siglip: Path) -> LlavaOvConfig:
    """Reads config.json in either format.

    Args:
        checkpoint: The checkpoint's folder.
        siglip: SigLIP's folder; lmms-lab's format leaves the tower's dimensions to it.

    Raises:
        TangoError: The model is of another kind, or asks for something that the graphs do not do.
    """
    data = read_json(checkpoint / "config.json")
    if "mm_vision_tower" in data:
        return _lmms_lab_config(data, siglip)
    if data.get("model_type") == "llava_onevision":
        return _hf_config(data)
    raise TangoError(
        f"{checkpoint} is a {data.get('model_type', 'nameless')} model, not LLaVA-OneVision",
        "name a llava-hf or lmms-lab checkpoint of LLaVA-OneVision",
    )


def _hf_config(data: dict[str, Any]) -> LlavaOvConfig:
    text, vision = _part(data, "text_config"), _part(data, "vision_config")
    _only(text, "model_type", "qwen2")
    _only(vision, "model_type", "siglip_vision_model")
    _only(data, "vision_feature_layer", -1)
    _only(data, "vision_feature_select_strategy", "full")
    _only(data, "projector_hidden_act", "gelu")
    _only(data, "multimodal_projector_bias", True)
    tied = bool(data.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return LlavaOvConfig(_siglip_config(vision), _qwen2_config(text), tied, False, text.get("eos_token_id"))


def _lmms_lab_config(data: dict[str, Any], siglip: Path) -> LlavaOvConfig:
    _only(data, "architectures", ["LlavaQwenForCausalLM"])
    _only(data, "mm_projector_type", "mlp2x_gelu")
    _only(data, "mm_spatial_pool_mode", "bilinear")
    _only(data, "mm_newline_position", "one_token")
    _only(data, "mm_spatial_pool_stride", 2)
    _only(data, "mm_patch_merge_type", "spatial_unpad")  # any other takes no newline
    source = read_json(siglip / "config.json")
    tower = _siglip_config(_part(source, "vision_config") or source, dropped_layers=1)
    # The head's absence is what ties it: some of these files lack tie_word_embeddings or deny it.
    return LlavaOvConfig(tower, _qwen2_config(data), True, True, data.get("eos_token_id"))


def _siglip_config(data: dict[str, Any], dropped_layers: int = 0) -> SiglipConfig:
    _only(data, "hidden_act", "gelu_pytorch_tanh")
    _only(data, "num_channels", 3)
    # What a file leaves out is transformers' SiglipVisionConfig default.
    defaults = SiglipConfig(768, 3072, 12, 12, image_size=224, patch_size=16)
    config = _filled(defaults, data)
    _divides(config.num_attention_heads, config.hidden_size, "num_attention_heads")
    return _filled(config, {"num_hidden_layers": config.num_hidden_layers - dropped_layers})


def _qwen2_config(data: dict[str, Any]) -> Qwen2Config:
    _only(data, "hidden_act", "silu")
    _only(data, "use_sliding_window", False)
    _only(data, "rope_scaling", None)
    rope = _part(data, "rope_parameters")  # transformers 5 writes this for rope_theta
    _only(rope, "rope_type", "default")
    # What a file leaves out is transformers' Qwen2Config default.
    defaults = Qwen2Config(4096, 22016, 32, 32, 32, 151936, rope_theta=10000.0)
    config = _filled(defaults, {**rope, **data})
    _divides(config.num_attention_heads, config.hidden_size, "num_attention_heads")
    _divides(config.num_key_value_heads, config.num_attention_heads, "num_key_value_heads")
    _only(data, "head_dim", config.head_dim)
    return config


_Config = TypeVar("_Config", SiglipConfig, Qwen2Config)


def _filled(defaults: _Config, data: dict[str, Any]) -> _Config:
    values = asdict(defaults)
    for name in (f.name for f in fields(defaults) if f.name in data):
        kind, value = type(values[name]), data[name]
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
            raise TangoError(f"config.json: {name} is {value!r}, not a positive {kind.__name__}", "mend config.json")
        values[name] = kind(value)
    return type(defaults)(**values)


def _part(data: dict[str, Any], key: str) -> dict[str, Any]:
    part = data.get(key) or {}
    if not isinstance(part, dict):
        raise TangoError(f"config.json: {key} is {part!r}, not an object", "mend config.json")
    return part


def _divides(heads: int, whole: int, key: str) -> None:
    if whole % heads:
        raise TangoError(f"config.json: {key} is {heads}, which does not divide {whole}", "mend config.json")


def _only(data: dict[str, Any], key: str, value: object) -> None:
    """Refuses a setting that would need another graph."""
    if data.get(key, value) not in (value, None):
        raise TangoError(
            f"config.json: {key} is {data[key]!r}, and only {value!r} is supported",
            "LLaVA-OneVision's released checkpoints have it so; is this another model?",
        )
