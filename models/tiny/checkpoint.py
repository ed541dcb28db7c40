"""Writes a trained model as the files of a released LLaVA-OneVision and its SigLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import SiglipVisionModel
from vocabulary import END, PAD

#: The chat template of llava-hf, as on the hub.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] if content['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ '\\n' + content['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_PROCESSOR = {"num_image_tokens": 729, "vision_feature_select_strategy": "full"}
_PIXELS = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "resample": 3, "rescale_factor": 1 / 255, "size": {"height": 384, "width": 384},
}  # fmt: skip


def save(folder: Path, model: Any, tower: Any, tokenizer: Tokenizer) -> None:
    """Writes ``folder``/llava and ``folder``/siglip in fp16.

    Args:
        folder: Output folder.
        model: The trained LlavaOnevisionForConditionalGeneration, without its tower.
        tower: The trained SigLIP tower with its pooling head. LLaVA gets it without the head. Only the head and the last
            norm of SigLIP are written, since nothing else of it is used.
        tokenizer: Its tokenizer.
    """
    llava, siglip = folder / "llava", folder / "siglip"
    siglip.mkdir(parents=True)
    model.model.vision_tower = SiglipVisionModel(model.config.vision_config)
    left = model.model.vision_tower.load_state_dict(tower.state_dict(), strict=False)
    assert not left.missing_keys, left.missing_keys
    model.cpu().half().save_pretrained(llava, max_shard_size="14MB")
    wanted = {name: t for name, t in tower.state_dict().items() if name.startswith(("head.", "post_layernorm."))}
    head = {f"vision_model.{name}": t.half().cpu().contiguous() for name, t in wanted.items()}
    save_file(head, siglip / "model.safetensors", {"format": "pt"})
    _write(siglip / "config.json", {"model_type": "siglip_vision_model", **_plain(tower.config)})
    tokenizer.save(str(llava / "tokenizer.json"))
    special = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END, "pad_token": PAD}
    _write(llava / "tokenizer_config.json", special)
    _write(llava / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write(llava / "processor_config.json", {"processor_class": "LlavaOnevisionProcessor", **_PROCESSOR})
    _write(llava / "preprocessor_config.json", {"image_processor_type": "LlavaOnevisionImageProcessor", **_PIXELS})
    _write(
        llava / "video_preprocessor_config.json", {"video_processor_type": "LlavaOnevisionVideoProcessor", **_PIXELS}
    )


def _plain(config: Any) -> dict[str, Any]:
    wanted = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
    )
    return {name: getattr(config, name) for name in wanted}


def _write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
