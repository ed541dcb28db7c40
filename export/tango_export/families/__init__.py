"""The model families, and the table of them."""

from __future__ import annotations

from tango_export.families import llava_ov, llava_video
from tango_export.families.base import Family, Model, Preset

FAMILIES: dict[str, Family] = {family.name: family for family in (llava_ov.FAMILY, llava_video.FAMILY)}

__all__ = ["FAMILIES", "Family", "Model", "Preset"]
