"""Random inputs for the CUDA library's attention of a prefill, and the same attention in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tango_plugins import native_library, structs


@dataclass(frozen=True)
class Shape:
    """As TangoAttentionShape."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int


class Pass:
    """Random tokens after ``begin`` positions of a random cache; the rest of the cache and the output are NaN.

    With ``positioned`` the angles are those of the tokens, which are at other positions than their places in the cache.
    """

    def __init__(self, shape, begin=0, seed=0, path=None, device="cuda", scale=1.0, positioned=False):
        self.shape, self.begin, self.library = shape, begin, native_library.load(path)
        self.positioned = positioned
        self.stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
        generator = torch.Generator(device).manual_seed(seed)

        def random(*size):
            return torch.randn(*size, generator=generator, device=device) * scale

        T, H, G, d, P = vars(shape).values()
        positions = torch.arange(P, device=device)
        if positioned:
            positions = 3 * P - torch.arange(T, device=device) * 2
        angles = positions.unsqueeze(1) * 1e4 ** (-torch.arange(0, d, 2, device=device) / d)
        self.tensors = {
            "qkv": random(T, (H + 2 * G) * d).half(),
            "bias": random((H + 2 * G) * d).half(),
            "last": torch.tensor([begin + T - 1], dtype=torch.int32, device=device),
            "cosines": angles.cos().half(),
            "sines": angles.sin().half(),
            "keys": random(G, P, d).half(),
            "values": random(G, P, d).half(),
            "attn_out": torch.full((T, H * d), torch.nan, dtype=torch.half, device=device),
        }
        for name in ("keys", "values"):
            self.tensors[name][:, begin:] = torch.nan

    def enqueue(self, **tensors):
        """Runs it on the current stream; returns the status."""
        pointers = {name: tensor.data_ptr() for name, tensor in (self.tensors | tensors).items()}
        given = structs.TangoAttentionTensors(**pointers)
        return self.library.tango_attention_enqueue(self.c_shape(), given, self.stream)

    def c_shape(self):
        return structs.TangoAttentionShape(**vars(self.shape), angles=self.positioned)

    def shares(self):
        """What the last token gives each position, once the cache is filled: the status, and fp32 [H, P]."""
        shares = torch.full((self.shape.heads, self.shape.capacity), torch.nan, device=self.tensors["qkv"].device)
        names = ("qkv", "bias", "last", "cosines", "sines", "keys")
        given = structs.TangoAttentionTensors(**{name: self.tensors[name].data_ptr() for name in names})
        function = self.library.tango_attention_shares_enqueue
        return function(self.c_shape(), given, shares.data_ptr(), self.stream), shares

    def expected(self):
        """Attention's output [T, H·d], the appended keys and values [G, T, d], and its weights [H, T, N], in fp64."""
        T, H, G, d, _ = vars(self.shape).values()
        sums = self.tensors["qkv"].double() + self.tensors["bias"].double()
        queries, keys, values = (part.view(T, -1, d).transpose(0, 1) for part in sums.split([H * d, G * d, G * d], 1))
        first = 0 if self.positioned else self.begin
        turns = [self.tensors[name][first : first + T].double() for name in ("cosines", "sines")]
        queries, keys = (rotate(rows, *turns) for rows in (queries, keys))
        # The cache is fp16, so attention sees rounded keys and values.
        held = [self.tensors[name][:, : self.begin].double() for name in ("keys", "values")]
        every = [torch.cat((old, new.half().double()), 1) for old, new in zip(held, (keys, values), strict=True)]
        k, v = (rows.repeat_interleave(H // G, 0) for rows in every)
        scores = queries @ k.transpose(1, 2) / d**0.5
        seen = torch.ones(T, self.begin + T, device=scores.device).tril(self.begin).bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ v).transpose(0, 1).reshape(T, H * d), keys, values, weights


def rotate(rows, cosines, sines):
    first, second = rows.chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)


def check(found):
    """Runs attention and compares the output and the new rows; no other row may be written."""
    T, _, _, _, P = vars(found.shape).values()
    before = {name: found.tensors[name].clone() for name in ("keys", "values")}
    attn_out, *new, weights = found.expected()
    assert found.enqueue() == 0, found.library.tango_last_error()
    close(found.tensors["attn_out"], attn_out, 3e-3)
    for name, rows in zip(("keys", "values"), new, strict=True):
        cache = found.tensors[name]
        close(cache[:, found.begin : found.begin + T], rows, 6e-4)
        old = [*range(found.begin), *range(found.begin + T, P)]
        assert torch.equal(cache[:, old].view(torch.int16), before[name][:, old].view(torch.int16))
    status, shares = found.shares()
    assert status == 0, found.library.tango_last_error()
    close(shares[:, : found.begin + T], weights[:, -1], 2e-3)
    assert (shares[:, found.begin + T :] == 0).all()


def close(found, wanted, tolerance):
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error <= tolerance, f"off by {float(error):.2e}"
    assert ((found.double() - wanted).abs() <= 20 * tolerance * wanted.abs().clamp(min=wanted.abs().mean())).all()
