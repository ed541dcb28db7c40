"""The model families, and the table of them."""

from __future__ import annotations

from tango_export.families import llava_ov, llava_video
from tango_export.families.base import Family, Model, Preset
from tango_export.families.qwen25_vl import family as qwen25_vl

FAMILIES: dict[str, Family] = {
    family.name: family for family in (llava_ov.FAMILY, llava_video.FAMILY, qwen25_vl.FAMILY)
}

__all__ = ["FAMILIES", "Family", "Model", "Preset"]
