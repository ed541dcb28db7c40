"""Qwen2.5-VL: its published checkpoints, and its prompt."""

from __future__ import annotations

from tango_export.families.base import Family, Preset
from tango_export.families.qwen25_vl.graphs import bundle_definitions
from tango_export.families.qwen25_vl.load import load

_3B = Preset("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct")
_7B = Preset("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct")

FAMILY = Family(
    name="qwen2.5-vl",
    presets={"qwen2.5-vl": _3B, _3B.bundle: _3B, _7B.bundle: _7B},
    load=load,
    definitions=bundle_definitions,
    context=16384,  # 32 frames of 16:9 are 11,520 tokens where nothing is pruned
)
