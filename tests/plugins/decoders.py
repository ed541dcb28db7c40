"""Random decoders for the CUDA library's decode step, and the same arithmetic in fp64."""

from __future__ import annotations

import torch

from tango_plugins.decoder import CudaDecoder
from tango_plugins.device_array import DeviceArray

EPS = 1e-6


def memory(tensor):
    return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


class Decoder:
    """Random weights and a random cache; the logits are poisoned before each step.

    Args:
        shape: Dimensions.
        seed: Of all random numbers.
        library: The CUDA library; None takes the one that ``tango plugin build`` installed.
        blocks: Thread blocks; 0 takes the whole GPU.
        device: Where everything lies.
    """

    def __init__(self, shape, seed=0, library=None, blocks=0, device="cuda"):
        self.shape, self.device, s = shape, device, shape
        self.generator = torch.Generator(device).manual_seed(seed)
        packed = (s.heads + 2 * s.kv_heads) * s.head_dim
        self.weights = {
            "norm.weight": self.random(s.width) + 1,
            "lm_head.weight": self.matrix(s.width, s.head_columns),
            "rotary.inv_freq": 1e6 ** (-torch.arange(0, s.head_dim, 2, device=device) / s.head_dim),
        }
        for i in range(s.layers):
            layer = {
                "input_layernorm.weight": self.random(s.width) + 1,
                "self_attn.qkv_proj.weight": self.matrix(s.width, packed),
                "self_attn.qkv_proj.bias": self.random(packed).half(),
                "self_attn.o_proj.weight": self.matrix(s.heads * s.head_dim, s.width),
                "post_attention_layernorm.weight": self.random(s.width) + 1,
                "mlp.gate_proj.weight": self.matrix(s.width, s.intermediate),
                "mlp.up_proj.weight": self.matrix(s.width, s.intermediate),
                "mlp.down_proj.weight": self.matrix(s.intermediate, s.width),
            }
            self.weights |= {f"layers.{i}.{name}": weight for name, weight in layer.items()}
        rows = s.kv_heads, s.capacity, s.head_dim
        self.cache = [self.random(*rows).half() for _ in range(2 * s.layers)]
        given = {name: memory(weight) for name, weight in self.weights.items()}
        self.decoder = CudaDecoder(shape, given, [memory(rows) for rows in self.cache], library, blocks)
        self.table = torch.from_numpy(self.decoder.table).to(device)
        room = torch.zeros(self.decoder.workspace_bytes + 256, dtype=torch.uint8, device=device)
        self.workspace = room[-room.data_ptr() % 256 :][: self.decoder.workspace_bytes]
        self.logits = torch.empty(s.vocabulary, device=device)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def matrix(self, rows, columns):
        return (self.random(rows, columns) * rows**-0.5).half()

    def embedding(self):
        return self.random(self.shape.width).half()

    def enqueue(self, embedding, position):
        tensors = {"logits": self.logits, "table": self.table, "workspace": self.workspace}
        named = {name: memory(tensor) for name, tensor in tensors.items()}
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        self.decoder.enqueue(memory(embedding), position, **named, stream=stream)

    def step(self, embedding, position):
        self.logits.fill_(torch.nan)
        self.enqueue(embedding, position)
        return self.logits.clone()


def norm(x, weight):
    return x * torch.rsqrt((x * x).mean() + EPS) * weight.double()


def reference(decoder, embedding, position, cache):
    """Logits in fp64; the new rows are put into ``cache`` in fp16, as the operator's cache has them."""
    s, get = decoder.shape, lambda name: decoder.weights[name].double()
    angles = position * decoder.weights["rotary.inv_freq"]  # in fp32, as in the graph
    cosine, sine = angles.double().cos(), angles.double().sin()
    x = embedding.double()
    for i in range(s.layers):
        at = f"layers.{i}."
        packed = norm(x, get(f"{at}input_layernorm.weight")) @ get(f"{at}self_attn.qkv_proj.weight")
        packed = (packed + get(f"{at}self_attn.qkv_proj.bias")).reshape(-1, s.head_dim)
        first, second = packed[: s.heads + s.kv_heads].chunk(2, -1)
        rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
        keys, values = cache[2 * i : 2 * i + 2]
        keys[:, position] = rotated[s.heads :].half()
        values[:, position] = packed[s.heads + s.kv_heads :].half()
        query = rotated[: s.heads].reshape(s.kv_heads, -1, s.head_dim) * s.head_dim**-0.5
        seen = slice(0, position + 1)
        weights = (query @ keys[:, seen].double().transpose(1, 2)).softmax(-1)
        x = x + (weights @ values[:, seen].double()).reshape(-1) @ get(f"{at}self_attn.o_proj.weight")
        y = norm(x, get(f"{at}post_attention_layernorm.weight"))
        gate = torch.nn.functional.silu(y @ get(f"{at}mlp.gate_proj.weight"))
        x = x + (gate * (y @ get(f"{at}mlp.up_proj.weight"))) @ get(f"{at}mlp.down_proj.weight")
    return norm(x, get("norm.weight")) @ get("lm_head.weight")[:, : s.vocabulary]


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def check_step(decoder, position):
    """A step's logits and new rows are those of fp64, and nothing else in the cache is written; takes it back."""
    before, cache = [rows.clone() for rows in decoder.cache], [rows.clone() for rows in decoder.cache]
    embedding = decoder.embedding()
    found, wanted = decoder.step(embedding, position), reference(decoder, embedding, position, cache)
    assert error(found, wanted) < 2e-4, position
    for rows, like, old in zip(decoder.cache, cache, before, strict=True):
        assert error(rows[:, position], like[:, position].double()) < 1e-3, position
        rows[:, position] = old[:, position]
        assert torch.equal(rows, old), position
