"""Random inputs for the CUDA library's attention of a vision tower, and the same attention in fp64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from tango_plugins import native_library, structs
from tests.plugins.attentions import rotate
from tests.plugins.patch_rotations import Rotation
from tests.plugins.patch_rotations import Shape as Patches

#: Of the result's norm: the weights and the result are rounded to fp16.
TOLERANCE = 1e-3

BIASES = ("query_bias", "key_bias", "value_bias")


@dataclass(frozen=True)
class Shape:
    """As TangoVisionAttentionShape, without strides."""

    frames: int
    rows: int
    columns: int
    heads: int
    head_dim: int
    window: int = 0

    @property
    def tokens(self):
        return self.rows * self.columns


class Vision:
    """Random queries, keys and values; the output is NaN.

    Args:
        shape: Of the attention.
        packed: One tensor [F, T, 3·H·d] holds all three; else each has rows of its own length, with NaN in between.
        has_bias: Whether there are biases, parts of the tensor ``bias`` [3·H·d].
        rotates: Whether queries and keys are rotated, by random angles.
        scale: Of the queries and keys.
        path: The library; None takes the one that is installed.
        device: Where the tensors are.
    """

    def __init__(self, shape, packed=True, has_bias=True, scale=1.0, path=None, device="cuda", seed=0, rotates=False):
        self.shape, self.library, self.path, self.device = shape, native_library.load(path), path, device
        width, rng = shape.heads * shape.head_dim, np.random.default_rng(seed)
        rows = shape.frames * shape.tokens
        gaps = (0, 0, 0) if packed else (8, 24, 16)
        self.strides = [3 * width] * 3 if packed else [width + gap for gap in gaps]
        sizes = (scale, scale, 1.0)
        parts = [(rng.normal(size=(rows, width)) * size).astype(np.float16) for size in sizes]
        if packed:
            whole = self.put(np.concatenate(parts, 1))
            self.tensors = {name: whole[:, i * width :] for i, name in enumerate(("query", "key", "value"))}
        else:
            padded = [
                np.pad(part, ((0, 0), (0, gap)), constant_values=np.nan) for part, gap in zip(parts, gaps, strict=True)
            ]
            self.tensors = {name: self.put(part) for name, part in zip(("query", "key", "value"), padded, strict=True)}
        if has_bias:
            self.bias = self.put(rng.normal(size=3 * width).astype(np.float16))
            self.tensors |= dict(zip(BIASES, self.bias.chunk(3), strict=True))
        if rotates:
            angles = rng.normal(size=(shape.tokens, shape.head_dim // 2)).astype(np.float32)
            self.tensors |= {"cosines": self.put(np.cos(angles)), "sines": self.put(np.sin(angles))}
        self.tensors["attn_out"] = self.put(np.full((rows, width), np.nan, np.float16))

    def put(self, array):
        return torch.from_numpy(array).to(self.device)

    def enqueue(self, strides=None, **tensors):
        """Runs it on the current stream; returns the status."""
        shape = structs.TangoVisionAttentionShape(*vars(self.shape).values(), *(strides or self.strides))
        pointers = {name: tensor.data_ptr() for name, tensor in (self.tensors | tensors).items()}
        given = structs.TangoVisionAttentionTensors(**pointers)
        return self.library.tango_vision_attention_enqueue(ctypes.byref(shape), ctypes.byref(given), self.stream())

    def stream(self):
        """The current stream."""
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0

    def read(self, name):
        """A tensor in fp64, [F, T, H, d]."""
        shape = self.shape
        held = self.tensors[name][:, : shape.heads * shape.head_dim].cpu().numpy().astype(np.float64)
        return held.reshape(shape.frames, shape.tokens, shape.heads, shape.head_dim)

    def biased(self, name):
        """The same, with its bias."""
        bias = self.tensors.get(f"{name}_bias")
        held = self.read(name)
        return held if bias is None else held + bias.cpu().numpy().astype(np.float64).reshape(held.shape[2:])

    def windows(self):
        """The tokens of each window."""
        shape = self.shape
        grid, size = (
            np.arange(shape.tokens).reshape(shape.rows, shape.columns),
            shape.window or max(shape.rows, shape.columns),
        )
        for row in range(0, shape.rows, size):
            for column in range(0, shape.columns, size):
                yield grid[row : row + size, column : column + size].ravel()

    def expected(self, frames=None):
        """The attention of some frames in fp64, [frames, T, H·d]."""
        shape = self.shape
        frames = range(shape.frames) if frames is None else frames
        query, key, value = (self.biased(name) for name in ("query", "key", "value"))
        if "cosines" in self.tensors:
            turns = [self.tensors[name].cpu().double().unsqueeze(1) for name in ("cosines", "sines")]
            query, key = (narrow(rotate(torch.from_numpy(part), *turns).numpy()) for part in (query, key))
        query = narrow(query)  # as tango/vision_attention.h says
        out = np.full((len(frames), shape.tokens, shape.heads, shape.head_dim), np.nan)
        for i, frame in enumerate(frames):
            for window in self.windows():
                q, k, v = (part[frame, window].swapaxes(0, 1) for part in (query, key, value))
                scores = q @ k.swapaxes(1, 2) / shape.head_dim**0.5
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[i, window] = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1)
        return out.reshape(len(frames), shape.tokens, -1)


def rotated_apart(found):
    """The same attention of a packed tensor, of queries and keys that tango/patch_rotation.h has rotated before."""
    shape, width = found.shape, found.shape.heads * found.shape.head_dim
    rotation = Rotation(Patches(shape.frames, shape.tokens, shape.heads, shape.head_dim), found.path, found.device)
    given = {"qkv": found.tensors["query"], "bias": found.bias}
    rotated = rotation.outputs(torch.half)
    assert rotation.enqueue(**given, cosines=found.tensors["cosines"], sines=found.tensors["sines"], **rotated) == 0
    apart = Vision(shape, path=found.path, device=found.device, has_bias=False)
    apart.strides = [width, width, found.strides[2]]
    apart.tensors |= rotated | {name: found.tensors[name] for name in ("value", "value_bias")}
    return apart


def narrow(array):
    """Numbers as fp16 holds them."""
    return array.astype(np.float16).astype(np.float64)


def check(found, frames=None, tolerance=TOLERANCE):
    """Runs it, and compares some frames, or all of them, with fp64."""
    assert found.enqueue() == 0, found.library.tango_last_error()
    shape = found.shape
    frames = range(shape.frames) if frames is None else frames
    wanted = found.expected(frames)
    out = found.read("attn_out")[list(frames)].reshape(wanted.shape)
    error = np.linalg.norm(out - wanted) / np.linalg.norm(wanted)
    assert error <= tolerance, f"off by {error:.2e}"
    scale = np.abs(wanted).mean(-1, keepdims=True)
    assert (np.abs(out - wanted) <= 20 * tolerance * np.maximum(np.abs(wanted), scale)).all()
