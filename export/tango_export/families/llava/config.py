"""config.json of a LLaVA checkpoint, in the format of Hugging Face (llava-hf) or of lmms-lab."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tango_export.checkpoint import read_json
from tango_export.families.settings import EDIT, divides, filled, is_set, only, part, rope
from tango_export.models.qwen2 import Qwen2Config
from tango_export.models.siglip import SiglipConfig
from tango_plugins import TangoError

#: Most patches along a side of a frame.
_MOST_SIDE = 64

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


def _hf_config(data: dict[str, Any]) -> LlavaConfig:
    text, vision = part(data, "text_config"), part(data, "vision_config")
    only(text, "model_type", "qwen2")
    only(vision, "model_type", "siglip_vision_model")
    only(data, "vision_feature_layer", -1)
    only(data, "vision_feature_select_strategy", "full")
    only(data, "projector_hidden_act", "gelu")
    only(data, "multimodal_projector_bias", True)
    tied = is_set(data, "tie_word_embeddings") or is_set(text, "tie_word_embeddings")
    return LlavaConfig(
        _siglip_config(vision), _qwen2_config(text, QWEN2_DEFAULTS), tied, False, text.get("eos_token_id")
    )


def _lmms_lab_config(data: dict[str, Any], siglip: Path, formats: Formats) -> LlavaConfig:
    only(data, "architectures", ["LlavaQwenForCausalLM"])
    only(data, "mm_projector_type", "mlp2x_gelu")
    only(data, "mm_use_im_start_end", False)
    only(data, "mm_use_im_patch_token", False)
    only(data, "mm_resampler_type", None)
    newline = data.get("mm_newline_position") or "one_token"  # as LLaVA-NeXT's code takes it
    if newline != formats.newline:
        family = _NEWLINES.get(str(newline))
        raise TangoError(
            f"config.json: mm_newline_position is {newline!r}, {formats.title} has {formats.newline!r}",
            f"another model says so: try --model {family}" if family else "the released checkpoints have that",
        )
    for key, value in formats.lmms_lab.items():
        only(data, key, value)
    source = read_json(siglip / "config.json")
    tower = _siglip_config(part(source, "vision_config") or source, dropped_layers=1)
    # The head's absence is what ties it: some of these files lack tie_word_embeddings or deny it.
    return LlavaConfig(tower, _qwen2_config(data, formats.text), True, True, data.get("eos_token_id"))


def _siglip_config(data: dict[str, Any], dropped_layers: int = 0) -> SiglipConfig:
    only(data, "hidden_act", "gelu_pytorch_tanh")
    only(data, "num_channels", 3)
    # What a file leaves out is transformers' SiglipVisionConfig default.
    defaults = SiglipConfig(768, 3072, 12, 12, image_size=224, patch_size=16)
    config = filled(defaults, data)
    divides(config.num_attention_heads, config.hidden_size, "num_attention_heads")
    check_side(config)
    return filled(config, {"num_hidden_layers": config.num_hidden_layers - dropped_layers})


def check_side(config: SiglipConfig) -> None:
    """Rejects a grid of patches that pooling cannot halve, or whose matrix, of its fourth power, would be huge.

    Raises:
        TangoError: It is too small or too large.
    """
    if not 2 <= config.side <= _MOST_SIDE:
        sizes = f"image_size {config.image_size} and patch_size {config.patch_size}"
        raise TangoError(f"config.json: {sizes} give {config.side} patches a side, not 2 to {_MOST_SIDE}", EDIT)


def _qwen2_config(data: dict[str, Any], defaults: Qwen2Config) -> Qwen2Config:
    only(data, "hidden_act", "silu")
    only(data, "use_sliding_window", False)
    only(data, "partial_rotary_factor", 1.0)
    config = filled(defaults, {**data, **rope(data)})
    only(data, "rope_theta", config.rope_theta)
    only(data, "layer_types", ["full_attention"] * config.num_hidden_layers)
    divides(config.num_attention_heads, config.hidden_size, "num_attention_heads")
    divides(config.num_key_value_heads, config.num_attention_heads, "num_key_value_heads")
    only(data, "head_dim", config.head_dim)
    return config
