"""LLaVA-Video: its published checkpoint, what its prompts say of the video, and its attention sinks."""

from __future__ import annotations

from functools import partial

from tango_export.families.base import Family, Preset
from tango_export.families.llava.config import Formats
from tango_export.families.llava.graphs import bundle_definitions
from tango_export.families.llava.load import Variant, load
from tango_export.models.qwen2 import Qwen2Config

_SIGLIP = "google/siglip-so400m-patch14-384"

#: As lmms-eval's ``llava_vid`` writes it: no space before "Please". Training had the same text.
_VIDEO_TEXT = (
    "The video lasts for {duration:.2f} seconds, and {frames} frames are uniformly sampled from it. "
    "These frames are located at {times}.Please answer the following questions related to this video.\n"
)

_VARIANT = Variant(
    formats=Formats(
        title="LLaVA-Video",
        hf=None,  # transformers has no class for it
        newline="grid",
        lmms_lab={
            "mm_spatial_pool_stride": 2,
            "mm_patch_merge_type": "spatial_unpad",
            "add_faster_video": False,  # another pooling of every other frame, with a token of its own
        },
        text=Qwen2Config(3584, 18944, 28, 28, 4, 152064),
    ),
    siglip=_SIGLIP,
    # The file says bilinear, as training did; LLaVA-NeXT's and Tango's evaluations overwrite it.
    pooling="average",
    frames=64,
    sinks={(13, 13): (26, 157, 11)},  # the code of Tango's authors, for the released tower
    video_text=_VIDEO_TEXT,
)

FAMILY = Family(
    name="llava-video",
    presets={
        "llava-video": Preset("llava-video-7b", "lmms-lab/LLaVA-Video-7B-Qwen2", _SIGLIP),
        "llava-video-7b": Preset("llava-video-7b", "lmms-lab/LLaVA-Video-7B-Qwen2", _SIGLIP),
    },
    load=partial(load, _VARIANT),
    definitions=partial(bundle_definitions, _VARIANT.pooling),
    context=16384,  # 64 frames of 13 rows of 14 tokens are 11,648
)
