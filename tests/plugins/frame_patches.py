"""Random frames for the CUDA library's patches, and the same patches in NumPy."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from tango_plugins import native_library, structs


@dataclass(frozen=True)
class Shape:
    """As TangoPatchesShape."""

    frames: int
    steps: int
    rows: int
    columns: int
    size: int


#: One patch of one pixel, frames of Qwen2.5-VL, and patches whose rows are of an odd number of bytes.
SHAPES = [Shape(1, 1, 1, 1, 1), Shape(2, 2, 28, 56, 14), Shape(3, 1, 10, 15, 5), Shape(1, 3, 6, 600, 3)]


class Patches:
    """Random pixels; the output is NaN."""

    def __init__(self, shape, path=None, device="cuda"):
        self.shape, self.library, self.device = shape, native_library.load(path), device
        rng = np.random.default_rng(0)
        F, S, H, W, p = vars(shape).values()
        arrays = {
            "pixels": rng.integers(0, 256, (F, S, H, W, 3), dtype=np.uint8),
            "mean": rng.random(3, dtype=np.float32),
            "deviation": rng.random(3, dtype=np.float32) + np.float32(0.1),
            "patches": np.full((F, H // p, W // p, S, p, 3 * p), np.nan, np.float16),
        }
        self.tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    def enqueue(self, **tensors):
        """Runs it on the current stream; returns the status."""
        pointers = {name: tensor.data_ptr() for name, tensor in (self.tensors | tensors).items()}
        shape = structs.TangoPatchesShape(**vars(self.shape))
        given = structs.TangoPatchesTensors(**pointers)
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        return self.library.tango_patches_enqueue(ctypes.byref(shape), ctypes.byref(given), stream)

    def expected(self):
        """The patches, to the bit."""
        F, S, H, W, p = vars(self.shape).values()
        pixels, mean, deviation = (self.tensors[n].cpu().numpy() for n in ("pixels", "mean", "deviation"))
        normalized = ((pixels.astype(np.float32) / np.float32(255) - mean) / deviation).astype(np.float16)
        parts = normalized.reshape(F, S, H // p, p, W // p, 3 * p)
        return torch.from_numpy(np.ascontiguousarray(parts.transpose(0, 2, 4, 1, 3, 5)))


def check(found):
    """Runs it, and compares it with NumPy bit for bit."""
    assert found.enqueue() == 0, found.library.tango_last_error()
    assert torch.equal(found.tensors["patches"].cpu(), found.expected())
