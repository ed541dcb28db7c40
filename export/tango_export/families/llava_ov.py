"""LLaVA-OneVision: its published checkpoints and its attention sinks."""

from __future__ import annotations

from functools import partial

from tango_export.families.base import Family, Preset
from tango_export.families.llava.config import Formats
from tango_export.families.llava.graphs import bundle_definitions
from tango_export.families.llava.load import Variant, load

_SIGLIP = "google/siglip-so400m-patch14-384"

_FORMATS = Formats(
    title="LLaVA-OneVision",
    hf="llava_onevision",
    newline="one_token",
    lmms_lab={
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_patch_merge_type": "spatial_unpad",  # any other takes no newline
    },
)

_VARIANT = Variant(
    formats=_FORMATS,
    siglip=_SIGLIP,
    pooling="bilinear",
    frames=32,
    sinks={(14, 14): (28, 27, 41, 169, 11, 12)},  # the code of Tango's authors, for the released SigLIP
)

FAMILY = Family(
    name="llava-ov",
    presets={
        "llava-ov": Preset("llava-ov-0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", _SIGLIP),
        "llava-ov-0.5b": Preset("llava-ov-0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", _SIGLIP),
        "llava-ov-7b": Preset("llava-ov-7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf", _SIGLIP),
    },
    load=partial(load, _VARIANT),
    definitions=partial(bundle_definitions, _VARIANT.pooling),
)
