"""Qwen2.5-VL's vision tower for pairs of frames of any size, its merger, and the salience of its last layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tango_export.graph.builder import Addition, Array, Biased, GraphBuilder, PatchGrid, Read, Weight
from tango_export.graph.integers import integers
from tango_export.layers import linear, product, wide_rms_norm

#: Mean and standard deviation of the pixels' channels, of CLIP's images (preprocessor_config.json).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

EPS = 1e-6

#: What the kernels of its attention take of the width of a head, and of the patches of a window.
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, MAX_WINDOW_PATCHES = 16, 128, 64

#: Elements of fp16 in 16 bytes.
_ROW = 8

#: From this share of the layers on, fp16 does not hold what the MLP gives: with the released checkpoints from about
#: layer 15 of 32 on (reports at ggml-org/llama.cpp#17534, ollama/ollama#18070 and lablup/mlxcel#1601).
_WIDE = 15 / 32


@dataclass(frozen=True)
class QwenVisionConfig:
    """Dimensions of the tower, in the words of its config.json."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def token_size(self) -> int:
        """Edge in pixels of what becomes one token of the decoder."""
        return self.patch_size * self.spatial_merge_size

    @property
    def window(self) -> int:
        """Edge of an attention window, in patches."""
        return self.window_size // self.patch_size


def vision(g: GraphBuilder, c: QwenVisionConfig) -> None:
    """Steps of two frames [F, 2, H, W, 3] → features [F, L, D] and salience [F, L].

    The residual stream is fp32: fp16 holds neither what the last layers add to it nor its squares.
    """
    frames = g.input("frames", "uint8", "F", c.temporal_patch_size, "H", "W", 3)
    mean, std = (_channels(g, f"pixels.{name}", values) for name, values in (("mean", MEAN), ("std", STD)))
    rows, columns, patches = g.form.patch_pixels(g, frames, mean, std, c.patch_size)
    grid = g.form.patch_grid(g, rows, columns, c.window, c.head_dim)
    x: str | Addition = embedding(g, "tower.patch_embed", patches, c)  # [F, R·C, width]
    for i in range(c.depth):
        x, qkv = block(g, f"tower.blocks.{i}", x, grid, c, i)
    assert isinstance(x, Addition)
    order = token_order(g, grid, c)
    g.output(merger(g, "tower.merger", x, order, c), "features", g.dtype, "F", "L", c.out_hidden_size)
    g.output(salience(g, "salience", qkv, grid, order, c), "salience", "float32", "F", "L")


def embedding(g: GraphBuilder, name: str, patches: str, c: QwenVisionConfig) -> str:
    """A vector for each patch, row by row: [F, R, C, ...] → [F, R·C, width] fp32.

    The convolution of patches that do not overlap is a matrix product, whose weight follows the order of their pixels.
    """
    size, steps, width = c.patch_size, c.temporal_patch_size, c.hidden_size
    x = g.reshape(patches, f"{name}.flat", 0, -1, steps * size * size * 3)
    tensor, shape = g.source(f"{name}.proj.weight"), (width, 3, steps, size, size)

    def values(read: Read) -> Array:
        return np.asarray(read(tensor).transpose(2, 3, 4, 1, 0).reshape(-1, width))

    weight = Weight(f"{name}.proj.weight", (3 * steps * size**2, width), g.dtype, {tensor: shape}, values)
    return g.widen(product(g, f"{name}.proj", x, weight, None, "any").value, f"{name}.fp32")


def block(
    g: GraphBuilder, name: str, x: str | Addition, grid: PatchGrid, c: QwenVisionConfig, index: int
) -> tuple[Addition, Biased]:
    """Attention and gated MLP, each after its norm: [F, R·C, width] fp32 → the same; and its queries, keys, values."""
    width, heads = c.hidden_size, c.num_heads
    normed, x = wide_rms_norm(g, f"{name}.norm1", x, width, EPS)
    qkv = linear(g, f"{name}.attn.qkv", normed, width, 3 * width, tokens="any")
    windowed = index not in c.fullatt_block_indexes
    mixed = g.form.patch_attention(g, f"{name}.attn", qkv, grid, heads, c.head_dim, windowed)
    attended = Addition(f"{name}.attended", x, linear(g, f"{name}.attn.proj", mixed, width, width, tokens="any"))
    normed, x = wide_rms_norm(g, f"{name}.norm2", attended, width, EPS)
    return Addition(name, x, mlp(g, f"{name}.mlp", normed, c, wide=index >= _WIDE * c.depth)), qkv


def mlp(g: GraphBuilder, name: str, x: str, c: QwenVisionConfig, *, wide: bool) -> Biased:
    """SwiGLU with biases, [F, R·C, width] → the same; ``wide``: wide from the product of gate and rest on.

    Rows of the released 3420 would not begin at multiples of 16 bytes, as tensor cores want them: zeros fill them up.
    """
    width, stored = c.hidden_size, c.intermediate_size
    inner = -(-stored // _ROW) * _ROW
    shape, filled = (x, width, inner), (width, stored)
    gate, up = (linear(g, f"{name}.{part}_proj", *shape, tokens="any", stored=filled) for part in ("gate", "up"))
    gated = g.form.swiglu(g, f"{name}.gated", gate, up, wide)
    g.scaled_by(gated, f"{name}.up_proj.weight", f"{name}.up_proj.bias")
    return linear(g, f"{name}.down_proj", gated, inner, width, tokens="any", stored=(stored, width), wide=wide)


def merger(g: GraphBuilder, name: str, x: Addition, order: str, c: QwenVisionConfig) -> str:
    """Norm, patches of a token side by side, linear, exact GELU, linear: [F, R·C, width] fp32 → [F, L, D]."""
    joined = c.hidden_size * c.spatial_merge_size**2
    normed, _ = wide_rms_norm(g, f"{name}.ln_q", x, c.hidden_size, EPS)
    tokens = g.node("Gather", [normed, order], f"{name}.ordered", axis=1)
    tokens = g.reshape(tokens, f"{name}.joined", 0, -1, joined)
    hidden = g.form.gelu(g, f"{name}.gelu", linear(g, f"{name}.mlp.0", tokens, joined, joined, tokens="any"))
    return g.form.add_bias(g, linear(g, f"{name}.mlp.2", hidden, joined, c.out_hidden_size, tokens="any"))


def salience(g: GraphBuilder, name: str, qkv: Biased, grid: PatchGrid, order: str, c: QwenVisionConfig) -> str:
    """Attention that each token receives from the mean query of its step, averaged over heads, [F, L] fp32.

    A token's key is the mean of its patches' keys, and each row sums to 1: as in the code of Tango's authors.
    """
    heads, head_dim, merged = c.num_heads, c.head_dim, c.spatial_merge_size**2
    query, keys = g.form.patch_query_key(g, name, qkv, grid, heads, head_dim)  # [F, R·C, heads, head_dim]
    query = g.mean(query, f"{name}.query", 1, keepdims=0)  # [F, heads, head_dim]
    query = g.node("Mul", [query, g.constant(head_dim**-0.5, "float32")], f"{name}.query.scaled")
    query = g.reshape(query, f"{name}.query.row", 0, heads, 1, head_dim)
    keys = g.node("Gather", [keys, order], f"{name}.ordered", axis=1)
    keys = g.reshape(keys, f"{name}.each_token", 0, -1, merged, heads * head_dim)
    keys = g.mean(keys, f"{name}.key", 2, keepdims=0)  # [F, L, heads · head_dim]
    keys = g.reshape(keys, f"{name}.key.heads", 0, -1, heads, head_dim)
    keys = g.node("Transpose", [keys], f"{name}.key.columns", perm=[0, 2, 3, 1])
    shares = g.node("Softmax", [g.node("MatMul", [query, keys], f"{name}.scores")], f"{name}.softmax", axis=-1)
    return g.mean(g.reshape(shares, f"{name}.shares", 0, heads, -1), f"{name}.mean", 1, keepdims=0)


def token_order(g: GraphBuilder, grid: PatchGrid, c: QwenVisionConfig) -> str:
    """Which patch comes when those of one token follow one another, token by token, [R·C] int64."""
    R, C = integers(g, "order", grid.rows, grid.columns)
    side = c.spatial_merge_size
    place = (R * C).range()
    token, inside, across = place // side**2, place % side**2, C // side
    row, column = token // across * side + inside // side, token % across * side + inside % side
    return (row * C + column).name


def no_device_form(c: QwenVisionConfig) -> str | None:
    """Why the kernels of its attention do not take a tower; None where they do (tango/vision_attention.h)."""
    if c.head_dim % HEAD_DIM_MULTIPLE or c.head_dim > MAX_HEAD_DIM:
        return f"its heads are {c.head_dim} wide, no multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    if c.window**2 > MAX_WINDOW_PATCHES:
        return f"its attention has windows of {c.window}×{c.window} patches, more than {MAX_WINDOW_PATCHES} in all"
    return None


def _channels(g: GraphBuilder, name: str, values: tuple[float, float, float]) -> str:
    return g.weight(Weight(name, (3,), "float32", {}, lambda _: np.array(values, np.float32)))
