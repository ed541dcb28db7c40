"""Random inputs for the CUDA library's rotation of a tower's queries and keys, and the same rotation in fp64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from tango_plugins import native_library, structs
from tests.plugins.attentions import close, rotate


@dataclass(frozen=True)
class Shape:
    """As TangoPatchRotationShape."""

    frames: int
    tokens: int
    heads: int
    head_dim: int


class Rotation:
    """Random rows and angles; the outputs are NaN."""

    def __init__(self, shape, path=None, device="cuda", seed=0):
        self.shape, self.library = shape, native_library.load(path)
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
        self.rotated = torch.full((F, T, 3 * H * d), torch.nan, dtype=torch.half, device=device)
        self.query, self.key = (torch.full((F, T, H * d), torch.nan, device=device) for _ in range(2))

    def enqueue(self, **tensors):
        """Runs it on the current stream; returns the status."""
        pointers = {name: tensor.data_ptr() for name, tensor in (self.tensors | tensors).items()}
        shape = structs.TangoPatchRotationShape(**vars(self.shape))
        given = structs.TangoPatchRotationTensors(**pointers)
        return self.library.tango_patch_rotation_enqueue(ctypes.byref(shape), ctypes.byref(given), self.stream)

    def expected(self):
        """Query, key and value in fp64, [F, T, H·d] each."""
        F, T, H, d = vars(self.shape).values()
        query, key, value = (self.tensors["qkv"].double() + self.tensors["bias"].double()).chunk(3, -1)
        turns = [self.tensors[name].double().unsqueeze(1) for name in ("cosines", "sines")]
        query, key = (rotate(part.reshape(F, T, H, d), *turns).reshape(F, T, H * d) for part in (query, key))
        return query, key, value


def check(found):
    """Runs it in both ways, and compares them with fp64."""
    wanted = found.expected()
    assert found.enqueue(rotated=found.rotated) == 0, found.library.tango_last_error()
    assert found.enqueue(query=found.query, key=found.key) == 0, found.library.tango_last_error()
    for part, expected in zip(found.rotated.chunk(3, -1), wanted, strict=True):
        close(part, expected, 5e-4)
    close(found.query, wanted[0], 1e-6)
    close(found.key, wanted[1], 1e-6)
