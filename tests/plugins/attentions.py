"""Random passes of tokens for the CUDA library's attention, and the same arithmetic in fp64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from tango_plugins import native_library


@dataclass(frozen=True)
class Shape:
    """As TangoAttentionShape."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int


class _Shape(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in Shape.__dataclass_fields__)


NAMES = ("packed", "bias", "last", "cosines", "sines", "keys", "values", "mixed")


class _Tensors(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in NAMES)


class Pass:
    """A random pass behind ``begin`` positions of a random cache; what lies behind it is NaN, and so is the result."""

    def __init__(self, shape, begin=0, seed=0, path=None, device="cuda", scale=1.0):
        self.shape, self.begin, self.library = shape, begin, native_library.load(path)
        self.stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
        generator = torch.Generator(device).manual_seed(seed)

        def random(*size):
            return torch.randn(*size, generator=generator, device=device) * scale

        T, H, G, d, P = vars(shape).values()
        angles = torch.arange(P, device=device).unsqueeze(1) * 1e4 ** (-torch.arange(0, d, 2, device=device) / d)
        self.tensors = {
            "packed": random(T, (H + 2 * G) * d).half(),
            "bias": random((H + 2 * G) * d).half(),
            "last": torch.tensor([begin + T - 1], dtype=torch.int32, device=device),
            "cosines": angles.cos().half(),
            "sines": angles.sin().half(),
            "keys": random(G, P, d).half(),
            "values": random(G, P, d).half(),
            "mixed": torch.full((T, H * d), torch.nan, dtype=torch.half, device=device),
        }
        for name in ("keys", "values"):
            self.tensors[name][:, begin:] = torch.nan

    def enqueue(self, **tensors):
        """Runs it on the current stream; gives the status."""
        shape = _Shape(*vars(self.shape).values())
        addresses = {name: tensor.data_ptr() for name, tensor in (self.tensors | tensors).items()}
        pointers = _Tensors(*(addresses[name] for name in NAMES))
        stream = ctypes.c_void_p(self.stream)
        return self.library.tango_attention_enqueue(ctypes.byref(shape), ctypes.byref(pointers), stream)

    def expected(self):
        """Mixed values [T, H·d], and the keys and values that the pass appends, [G, T, d] each, fp64."""
        T, H, G, d, _ = vars(self.shape).values()
        sums = self.tensors["packed"].double() + self.tensors["bias"].double()
        queries, keys, values = (part.view(T, -1, d).transpose(0, 1) for part in sums.split([H * d, G * d, G * d], 1))
        turns = [self.tensors[name][self.begin : self.begin + T].double() for name in ("cosines", "sines")]
        queries, keys = (rotate(rows, *turns) for rows in (queries, keys))
        # What the cache holds is rounded: that is what the pass attends to.
        held = [self.tensors[name][:, : self.begin].double() for name in ("keys", "values")]
        every = [torch.cat((old, new.half().double()), 1) for old, new in zip(held, (keys, values), strict=True)]
        k, v = (rows.repeat_interleave(H // G, 0) for rows in every)
        scores = queries @ k.transpose(1, 2) / d**0.5
        seen = torch.ones(T, self.begin + T, device=scores.device).tril(self.begin).bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ v).transpose(0, 1).reshape(T, H * d), keys, values


def rotate(rows, cosines, sines):
    first, second = rows.chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)


def check(found):
    """Runs a pass and compares: the result, the new rows, and that nothing else was written."""
    T, _, _, _, P = vars(found.shape).values()
    before = {name: found.tensors[name].clone() for name in ("keys", "values")}
    mixed, *new = found.expected()
    assert found.enqueue() == 0, found.library.tango_last_error()
    close(found.tensors["mixed"], mixed, 3e-3)
    for name, rows in zip(("keys", "values"), new, strict=True):
        cache = found.tensors[name]
        close(cache[:, found.begin : found.begin + T], rows, 6e-4)
        old = [*range(found.begin), *range(found.begin + T, P)]
        assert torch.equal(cache[:, old].view(torch.int16), before[name][:, old].view(torch.int16))


def close(found, wanted, tolerance):
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error <= tolerance, f"off by {float(error):.2e}"
    assert ((found.double() - wanted).abs() <= 20 * tolerance * wanted.abs().clamp(min=wanted.abs().mean())).all()
