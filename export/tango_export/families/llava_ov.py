"""LLaVA-OneVision: its published checkpoints, its prompts and its attention sinks."""

from __future__ import annotations

from functools import partial

from tango_export.families.base import Family, Preset
from tango_export.families.llava.config import Formats
from tango_export.families.llava.graphs import bundle_definitions
from tango_export.families.llava.load import Variant, load

_SIGLIP = "google/siglip-so400m-patch14-384"

#: llava-hf's template as it is on the hub.
HF_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] if content['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ '\\n' + content['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: lmms-lab's conversation `qwen_1_5`; one <image> stands for the whole video.
QWEN_1_5_TEMPLATE = (
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for content in message['content'] if content['type'] == 'video' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_FORMATS = Formats(
    title="LLaVA-OneVision",
    hf="llava_onevision",
    lmms_lab={
        "mm_spatial_pool_mode": "bilinear",
        "mm_newline_position": "one_token",
        "mm_spatial_pool_stride": 2,
        "mm_patch_merge_type": "spatial_unpad",  # any other takes no newline
    },
)

_VARIANT = Variant(
    formats=_FORMATS,
    siglip=_SIGLIP,
    frames=32,
    sinks={(14, 14): (28, 27, 41, 169, 11, 12)},  # the code of Tango's authors, for the released SigLIP
    hf_template=HF_TEMPLATE,
    lmms_lab_template=QWEN_1_5_TEMPLATE,
)

FAMILY = Family(
    name="llava-ov",
    presets={
        "llava-ov": Preset("llava-ov-0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", _SIGLIP),
        "llava-ov-0.5b": Preset("llava-ov-0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", _SIGLIP),
        "llava-ov-7b": Preset("llava-ov-7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf", _SIGLIP),
    },
    load=partial(load, _VARIANT),
    definitions=bundle_definitions,
)
