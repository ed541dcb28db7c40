"""Random rows for the CUDA library's norms, and the same norms in fp64."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from tango_plugins import native_library, structs

HALF, SINGLE = np.float16, np.float32
EPSILON = 1e-6

#: One rounding to the result's type, relative to the result, after arithmetic in fp32, relative to what is added up.
ROUNDING = {HALF: 2**-11 * 1.02, SINGLE: 0.0}
ARITHMETIC = 1e-6

#: Types of the residual stream, of the branch and of the result.
TYPES = [
    (HALF, HALF, HALF),
    (SINGLE, SINGLE, SINGLE),
    (SINGLE, HALF, HALF),
    (SINGLE, SINGLE, HALF),
    (HALF, SINGLE, HALF),
    (HALF, HALF, SINGLE),
    (HALF, SINGLE, SINGLE),
    (SINGLE, HALF, SINGLE),
]


class Rows:
    """Random rows and weights on a device; the outputs are NaN.

    Args:
        kind: "layer" or "rms".
        rows, width: Of the residual stream.
        types: Of the stream, the branch and the result.
        without: Names of tensors that are null.
        offset: Elements from an aligned address to each tensor.
        mean: Of the residual stream.
        path: The library; None takes the one that is installed.
        device: Where the tensors are.
    """

    def __init__(
        self, kind, rows, width, types=TYPES[0], without=(), offset=0, mean=0.3, path=None, device="cuda", seed=0
    ):
        self.kind, self.types, self.library, self.device = kind, types, native_library.load(path), device
        self.size, self.offset = (rows, width), offset
        rng = np.random.default_rng(seed)
        stream, branch, y = types
        host = {
            "residual": (rng.normal(size=self.size) * 2 + mean).astype(stream),
            "branch": rng.normal(size=self.size).astype(branch),
            "bias": rng.normal(size=width).astype(branch),
            "weight": rng.normal(1, 0.5, size=width).astype(SINGLE),
            "beta": rng.normal(size=width).astype(SINGLE),
            "sum": np.full(self.size, np.nan, stream),
            "y": np.full(self.size, np.nan, y),
        }
        self.tensors = {name: self.put(array) for name, array in host.items() if name not in without}

    def put(self, array):
        """A copy on the device, at the offset."""
        held = torch.from_numpy(np.concatenate([np.zeros(self.offset, array.dtype), array.ravel()])).to(self.device)
        return held[self.offset :].view(array.shape)

    def enqueue(self, epsilon=EPSILON, y_dtype=None, y_scale=0.0, **tensors):
        """Runs it on the current stream; returns the status."""
        stream, branch, y = (int(kind is SINGLE) for kind in self.types)
        y = y if y_dtype is None else y_dtype
        shape = structs.TangoNormShape(*self.size, stream, branch, branch, y, epsilon, 1.0, y_scale)
        pointers = {name: tensor.data_ptr() for name, tensor in (self.tensors | tensors).items()}
        function = getattr(self.library, f"tango_{self.kind}_norm_enqueue")
        queue = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        return function(ctypes.byref(shape), ctypes.byref(structs.TangoNormTensors(**pointers)), queue)

    def read(self, name):
        """A tensor in fp64; zeros if it is null."""
        if name not in self.tensors:
            return np.zeros(self.size[1])
        return self.tensors[name].cpu().numpy().astype(np.float64)

    def expected(self, total):
        """The norm of ``total`` [rows, width] in fp64, and the size of what was added up for each element."""
        mean = total.mean(1, keepdims=True) if self.kind == "layer" else 0.0
        scales = self.read("weight") / np.sqrt(((total - mean) ** 2).mean(1, keepdims=True) + EPSILON)
        beta = self.read("beta")
        return (total - mean) * scales + beta, (np.abs(total) + np.abs(mean)) * np.abs(scales) + np.abs(beta)


def check(found):
    """Runs the norm and compares the sum, if it is written, and the norm of the sum as it was rounded with fp64."""
    exact = found.read("residual") + (found.read("branch") + found.read("bias"))
    size = np.abs(found.read("residual")) + np.abs(found.read("branch")) + np.abs(found.read("bias"))
    stream, _, y = found.types
    assert found.enqueue() == 0, found.library.tango_last_error()
    total = found.read("sum") if "sum" in found.tensors else found.read("residual")
    assert (np.abs(total - exact) <= ROUNDING[stream] * np.abs(exact) + ARITHMETIC * size + 3e-8).all()
    expected, size = found.expected(total)
    error = np.abs(found.read("y") - expected)
    assert (error <= ROUNDING[y] * np.abs(expected) + ARITHMETIC * size + 3e-8).all(), error.max()
