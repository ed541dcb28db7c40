"""Random inputs for the CUDA library's rotation of a tower's queries and keys, and the same rotation in fp64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from tango_plugins import native_library, structs
from tests.plugins.attentions import close, rotate

#: By their TangoDtype.
DTYPES = (torch.half, torch.float)


@dataclass(frozen=True)
class Shape:
    """As TangoPatchRotationShape, without the dtype."""

    frames: int
    tokens: int
    heads: int
    head_dim: int


class Rotation:
    """Random rows and angles."""

    def __init__(self, shape, path=None, device="cuda", seed=0):
        self.shape, self.library, self.device = shape, native_library.load(path), device
        self.stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
        generator = torch.Generator(device).manual_seed(seed)
        F, T, H, d = vars(shape).values()
        angles = torch.randn(T, d // 2, generator=generator, device=device)
        self.tensors = {
            "qkv": torch.randn(F, T, 3 * H * d, generator=generator, device=device).half(),
            "bias": torch.randn(3 * H * d, generator=generator, device=device).half(),
            "cosines": angles.cos(),
            "sines": angles.sin(),
        }

    def outputs(self, dtype):
        """Queries and keys, NaN."""
        F, T, H, d = vars(self.shape).values()
        size = (F, T, H * d)
        return {name: torch.full(size, torch.nan, dtype=dtype, device=self.device) for name in ("query", "key")}

    def enqueue(self, dtype=torch.half, **tensors):
        """Runs it on the current stream; returns the status."""
        pointers = {name: tensor.data_ptr() for name, tensor in (self.tensors | tensors).items()}
        shape = structs.TangoPatchRotationShape(**vars(self.shape), dtype=DTYPES.index(dtype))
        given = structs.TangoPatchRotationTensors(**pointers)
        return self.library.tango_patch_rotation_enqueue(ctypes.byref(shape), ctypes.byref(given), self.stream)

    def expected(self):
        """Query and key in fp64, [F, T, H·d] each."""
        F, T, H, d = vars(self.shape).values()
        query, key, _ = (self.tensors["qkv"].double() + self.tensors["bias"].double()).chunk(3, -1)
        turns = [self.tensors[name].double().unsqueeze(1) for name in ("cosines", "sines")]
        return [rotate(part.reshape(F, T, H, d), *turns).reshape(F, T, H * d) for part in (query, key)]


def check(found):
    """Runs it for each type of result, and compares them with fp64."""
    for dtype, tolerance in zip(DTYPES, (5e-4, 1e-6), strict=True):
        outputs = found.outputs(dtype)
        assert found.enqueue(dtype, **outputs) == 0, found.library.tango_last_error()
        for part, expected in zip(outputs.values(), found.expected(), strict=True):
            close(part, expected, tolerance)
