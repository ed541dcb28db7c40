"""Checkpoints whose decoder is stored in 4 bits, packed element by element as the methods' own programs do it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.export.edits import edit_json, edit_weights

Array = NDArray[Any]

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_LAYER = re.compile(r"(?!.*(visual|vision_tower)).*layers\.\d+\..*_proj\.weight$")

SETTINGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2", "sym": False},
    "gptq_sym": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": True},
}


def packed(source: Path, folder: Path, kind: str) -> tuple[Path, Path]:
    """Copies of a checkpoint with its decoder quantized to the nearest: (in 4 bits, the same numbers in fp32)."""
    stored, plain = (Path(shutil.copytree(source, folder / f"{kind}-{name}")) for name in ("stored", "plain"))

    def edit(pack: bool, weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if _LAYER.fullmatch(name)]:
            q, zero, scale = _quantized(weights.pop(name).float().numpy(), kind == "gptq_sym")
            if pack:
                parts = _pack(kind, q, zero, scale)
                weights.update({name.replace("weight", key): torch.from_numpy(value) for key, value in parts.items()})
            else:
                wide = (q - np.repeat(zero, GROUP, 1)) * np.repeat(scale.astype(np.float32), GROUP, 1)
                weights[name] = torch.from_numpy(wide.astype(np.float32))

    edit_weights(plain, lambda weights: edit(False, weights))
    edit_weights(stored, lambda weights: edit(True, weights))
    edit_json(stored / "config.json", lambda data: data.update(quantization_config=SETTINGS[kind]))
    return stored, plain


def _quantized(weight: Array, symmetric: bool) -> tuple[Array, Array, Array]:
    """[out, in] → (q [out, in], zero points [out, groups], fp16 scales [out, groups])."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    scale = np.maximum((high - low) / 15, 1e-6).astype(np.float16)
    wide = scale.astype(np.float32)
    zero = np.full(low.shape, 8) if symmetric else np.clip(np.rint(-low / wide), 1, 15).astype(int)
    q = np.clip(np.rint(groups / wide[..., None]) + zero[..., None], 0, 15)
    return q.reshape(weight.shape).astype(int), zero, scale


def _pack(kind: str, q: Array, zero: Array, scale: Array) -> dict[str, Array]:
    rows = q.shape[1]
    order = _AWQ_ORDER if kind == "awq" else range(8)
    parts = {"scales": np.ascontiguousarray(scale.T), "qzeros": _words(zero.T - (kind in ("gptq", "gptq_sym")), order)}
    if kind == "awq":
        return parts | {"qweight": _words(q.T, order)}
    index = (np.arange(rows) // GROUP).astype(np.int32)
    return parts | {"qweight": np.ascontiguousarray(_words(q, order).T), "g_idx": index}


def _words(elements: Array, order: Any) -> Array:
    """[rows, columns] → int32 [rows, columns / 8]."""
    words = np.zeros((len(elements), elements.shape[1] // 8), np.int64)
    for place, column in enumerate(order):
        words |= elements[:, column::8].astype(np.int64) << 4 * place
    return words.astype(np.uint32).view(np.int32)
