"""The Qwen2 decoder for one sequence, its key/value cache outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tango_export.modules.layers import Linear, PackedLinear, RMSNorm, attention


@dataclass(frozen=True)
class Qwen2Config:
    """Dimensions of a Qwen2 decoder, in the words of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class LastPosition(nn.Module):
    """The last of T positions: all that is asked of the last layer, but for its keys and values.

    Args:
        shape: Of one position; numbers, which say what TensorRT does not see: that no size is open from here on.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """[T, ...] → [1, ...]."""
        return x[-1:].reshape(1, *self.shape)


class SelfAttention(nn.Module):
    """Grouped-query attention over cached and new keys.

    Args:
        config: Dimensions.
        dtype: Of the weights.
        final: Only the last position is asked for.
    """

    def __init__(self, config: Qwen2Config, dtype: torch.dtype, final: bool) -> None:
        super().__init__()
        self.last = LastPosition(config.num_attention_heads, config.head_dim) if final else None
        self.width, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        kv_width = self.kv_heads * self.head_dim
        self.qkv_proj = PackedLinear(self.width, dtype, q_proj=self.width, k_proj=kv_width, v_proj=kv_width)
        self.o_proj = Linear(self.width, self.width, dtype, bias=False)

    def forward(self, x: Tensor, angles: Rotation, mask: Tensor, cached: Cache) -> tuple[Tensor, Cache]:
        """[T, width], with the cache of P tokens → [T or 1, width] and the T new rows of the cache."""
        rotary = self.heads + self.kv_heads  # the heads of query and key; the value's stand behind them
        packed = self.qkv_proj(x).reshape(-1, rotary + self.kv_heads, self.head_dim)
        rotated, value = angles.rotate(packed[:, :rotary]), packed[:, rotary:].transpose(0, 1)
        query, key = rotated[:, : self.heads], rotated[:, self.heads :].to(x.dtype).transpose(0, 1)
        tokens = -1
        if self.last is not None:
            query, mask, tokens = self.last(query), mask[-1:], 1
        keys, values = torch.cat((cached[0], key), 1), torch.cat((cached[1], value), 1)
        grouped = query.reshape(tokens, self.kv_heads, self.heads // self.kv_heads, self.head_dim).permute(1, 2, 0, 3)
        mixed = attention(grouped, keys.unsqueeze(1), values.unsqueeze(1), self.head_dim, mask)
        return self.o_proj(mixed.permute(2, 0, 1, 3).reshape(tokens, self.width)), (key, value)


class MLP(nn.Module):
    """SiLU-gated linear unit."""

    def __init__(self, config: Qwen2Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, dtype, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, dtype, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, dtype, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, width] → the same."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each after its norm.

    Args:
        config: Dimensions.
        dtype: Of the weights.
        final: Only the last position is asked for.
    """

    def __init__(self, config: Qwen2Config, dtype: torch.dtype, final: bool) -> None:
        super().__init__()
        self.last = LastPosition(config.hidden_size) if final else None
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, dtype, final)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, dtype)

    def forward(self, x: Tensor, angles: Rotation, mask: Tensor, cached: Cache) -> tuple[Tensor, Cache]:
        """[T, width], with the cache of P tokens → [T or 1, width] and the T new rows of the cache."""
        mixed, rows = self.self_attn(self.input_layernorm(x), angles, mask, cached)
        x = (x if self.last is None else self.last(x)) + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), rows


class Decoder(nn.Module):
    """Embeddings in, logits of the last position and the new rows of the cache out.

    The cache may be longer than what it holds: key j counts only where j < positions[0]. So one graph serves prefill
    (an empty cache) and decoding (a cache of fixed capacity), and nothing but ``positions`` says how full it is.

    Args:
        config: Dimensions.
        dtype: Of the weights and activations.
        vocabulary: Ids that the tokenizer knows. The rows of the head beyond them are padding, some of it random; they
            give no logit, so they are never sampled.
    """

    def __init__(self, config: Qwen2Config, dtype: torch.dtype, vocabulary: int) -> None:
        super().__init__()
        self.width, self.vocabulary = config.hidden_size, vocabulary
        last = config.num_hidden_layers - 1
        self.layers = nn.ModuleList(DecoderLayer(config, dtype, i == last) for i in range(last + 1))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype, bias=False)
        self.rotary = Rotary(config)

    def forward(self, embeddings: Tensor, positions: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """One pass.

        Args:
            embeddings: [T, width].
            positions: [T] int64, consecutive.
            cache: Keys and values of each layer in turn, each [heads, P, width of a head].

        Returns:
            Logits of the last position [vocabulary] fp32, then the T new keys and values of each layer in turn.
        """
        angles, mask = self.rotary(positions), causal_mask(positions, cache[0].shape[1])
        x, rows = embeddings, []
        for layer, key, value in zip(self.layers, cache[::2], cache[1::2], strict=True):
            x, new = layer(x, angles, mask, (key, value))
            rows.extend(new)
        logits = self.lm_head(self.norm(x)).reshape(-1)[: self.vocabulary]
        return (logits.float(), *rows)


Cache = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary angles of T positions, [T, 1, width of a head] fp32, and half that width."""

    cos: Tensor
    sin: Tensor
    half: int

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates [T, heads, width of a head] by the half-split rule, in fp32."""
        x = x.float()
        first, second = x[..., : self.half], x[..., self.half :]
        return x * self.cos + torch.cat((-second, first), -1) * self.sin


class Rotary(nn.Module):
    """Rotary position embedding, angles in fp32."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.inv_freq = nn.Parameter(torch.empty(config.head_dim // 2, dtype=torch.float32))

    def forward(self, positions: Tensor) -> Rotation:
        """[T] int64 → the rotation."""
        angles = positions.float().unsqueeze(1) * self.inv_freq
        angles = torch.cat((angles, angles), -1).unsqueeze(1)
        return Rotation(angles.cos(), angles.sin(), self.config.head_dim // 2)

    def frequencies(self) -> Tensor:
        """The constant, [width of a head / 2] fp32."""
        exponents = torch.arange(0, self.config.head_dim, 2, dtype=torch.int64).float() / self.config.head_dim
        return 1.0 / (self.config.rope_theta**exponents)


def causal_mask(positions: Tensor, cached: int) -> Tensor:
    """What may be attended to, as an addend of the scores.

    No tensor in it is ever empty, though the cache may be: TensorRT joins empty tensors, but not each of its layers
    takes them (NVIDIA/TensorRT#2102).

    Args:
        positions: [T] int64, consecutive.
        cached: Capacity P of the cache.

    Returns:
        [T, P + T] fp32: 0 where allowed, the lowest finite number elsewhere.
    """
    slots, begin = torch.arange(cached + positions.shape[0], device=positions.device), positions[0]
    unused = torch.iinfo(torch.int32).max
    new = slots - cached + begin
    keys = torch.where(slots < cached, torch.where(slots < begin, slots, unused), new)
    return torch.where(keys > positions.unsqueeze(1), torch.finfo(torch.float32).min, 0.0)
