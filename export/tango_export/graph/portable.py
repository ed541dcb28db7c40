"""The portable form: standard ONNX at opset 17, for CPUs, TensorRT and any other runtime.

What each function takes and returns: :class:`tango_export.graph.builder.Form`.

fp16 stays finite here. The query is scaled before the scores, and scores, softmax, rotation and norms are in fp32: with
Qwen2's key biases of ±150 and residual channels of 1e4 they would overflow.

What TensorRT's parser wants (onnx-tensorrt, release/8.6-GA, builtin_op_importers.cpp; 10.1 accepts all of it):

- Sizes that the configuration knows are numbers: only F, N, P and the size of a frame are read from tensors. Where two
  sizes of a shape are open, one stays where it was (a 0 in Reshape) or a Gather orders elements.
- uint8 is an input that a cast reads, and nothing else. Up to 8.6 int64 becomes int32, so no integer may exceed it.
- No tensor but the cache is ever empty (NVIDIA/TensorRT#2102).
- Both operands of an operator have one dtype: strongly typed networks (10 on) insert no cast.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto

from tango_export.graph.builder import (
    Addition,
    Array,
    Biased,
    CacheShape,
    GraphBuilder,
    Linear,
    Positions,
    Weight,
)


def linear(g: GraphBuilder, layer: Linear) -> str:
    matrix = g.widen(layer.weight, f"{layer.weight}.fp32") if layer.wide else layer.weight
    return g.node("MatMul", [layer.input, matrix], layer.output)


def add_bias(g: GraphBuilder, x: Biased) -> str:
    if x.bias is None:
        return x.value
    return x.name if g.has(x.name) else g.node("Add", [x.value, x.bias], x.name)


def layer_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    x = added(g, x)
    weights = [g.parameter(f"{name}.{kind}", width, dtype="float32") for kind in ("weight", "bias")]
    wide = g.widen(x, f"{name}.fp32")
    normed = g.node("LayerNormalization", [wide, *weights], f"{name}.normalized", axis=-1, epsilon=eps)
    return g.narrow(normed, name), x


def rms_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    x = added(g, x)
    return _rms_norm(g, name, g.widen(x, f"{name}.fp32"), width, eps), x


def wide_rms_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    if isinstance(x, Addition):
        branch = add_bias(g, x.branch)
        x = g.node("Add", [x.residual, branch if x.branch.wide else g.widen(branch, f"{branch}.fp32")], x.name)
    return _rms_norm(g, name, x, width, eps), x


def _rms_norm(g: GraphBuilder, name: str, wide: str, width: int, eps: float) -> str:
    square = g.node("Mul", [wide, wide], f"{name}.square")
    mean = g.mean(square, f"{name}.mean", -1, keepdims=1)
    root = g.node("Sqrt", [g.node("Add", [mean, _fp32(g, eps)], f"{name}.variance")], f"{name}.root")
    scale = g.node("Div", [_fp32(g, 1.0), root], f"{name}.scale")
    normed = g.node("Mul", [wide, scale], f"{name}.normalized")
    gain = g.parameter(f"{name}.weight", width, dtype="float32")
    return g.narrow(g.node("Mul", [normed, gain], f"{name}.scaled"), name)


def gelu(g: GraphBuilder, name: str, x: Biased) -> str:
    y = add_bias(g, x)
    root, one, half = (g.constant(value, g.dtype) for value in (math.sqrt(2), 1.0, 0.5))
    erf = g.node("Erf", [g.node("Div", [y, root], f"{name}.div")], f"{name}.erf")
    twice = g.node("Mul", [y, g.node("Add", [erf, one], f"{name}.add")], f"{name}.twice")
    return g.node("Mul", [twice, half], name)


def gelu_tanh(g: GraphBuilder, name: str, x: Biased) -> str:
    y = add_bias(g, x)
    cubic, root, one, half = (g.constant(value, g.dtype) for value in (0.044715, math.sqrt(2 / math.pi), 1.0, 0.5))
    cube = g.node("Mul", [y, g.node("Mul", [y, y], f"{name}.square")], f"{name}.cube")
    inner = g.node("Add", [y, g.node("Mul", [cubic, cube], f"{name}.cubic")], f"{name}.sum")
    tanh = g.node("Tanh", [g.node("Mul", [root, inner], f"{name}.inner")], f"{name}.tanh")
    twice = g.node("Mul", [y, g.node("Add", [one, tanh], f"{name}.add")], f"{name}.twice")
    return g.node("Mul", [half, twice], name)


def swiglu(g: GraphBuilder, name: str, gate: Biased, up: Biased, wide: bool) -> str:
    a, b = (add_bias(g, part) for part in (gate, up))
    if wide:
        a, b = (g.widen(part, f"{part}.fp32") for part in (a, b))
    silu = g.node("Mul", [a, g.node("Sigmoid", [a], f"{name}.sigmoid")], f"{name}.silu")
    return g.node("Mul", [silu, b], name)


def attention(g: GraphBuilder, name: str, qkv: Biased, tokens: int, heads: int, head_dim: int) -> str:
    query, key, value = _split_heads(g, name, qkv, tokens, heads, head_dim)
    mixed = attend(g, name, g.widen(query, f"{name}.query.fp32"), key, value, head_dim)
    return _merge_heads(g, name, mixed, tokens, heads, head_dim)


def attention_in_one_kernel(g: GraphBuilder, name: str, qkv: Biased, tokens: int, heads: int, head_dim: int) -> str:
    """As TensorRT fuses it: the operands of the first product stay in fp16, the scores are widened after it.

    The fused kernel has the scores in fp32 all along. An engine that does not fuse it rounds them to fp16.
    """
    query, key, value = _split_heads(g, name, qkv, tokens, heads, head_dim)
    scaled = g.node("Mul", [query, g.constant(head_dim**-0.5, g.dtype)], f"{name}.query.scaled")
    turned = g.node("Transpose", [key], f"{name}.key.transposed", perm=[0, 1, 3, 2])
    scores = g.widen(g.node("MatMul", [scaled, turned], f"{name}.scores"), f"{name}.scores.fp32")
    shares = g.narrow(g.node("Softmax", [scores], f"{name}.softmax", axis=-1), f"{name}.shares")
    mixed = g.node("MatMul", [shares, value], f"{name}.mixed")
    return _merge_heads(g, name, mixed, tokens, heads, head_dim)


def constant_matmul(g: GraphBuilder, name: str, weight: str, x: str) -> str:
    return g.node("MatMul", [weight, x], name)


def start_decoder(g: GraphBuilder, width: int, cache: CacheShape) -> tuple[str, Positions]:
    """The cache may be longer than its rows: key j counts only where j < positions[0]. So one graph serves prefill
    (an empty cache) and decoding (a cache of fixed capacity)."""
    embeddings = g.input("rows" if cache.first else "embeddings", g.dtype, "N", width)
    positions = g.input("positions", "int64", "N")
    rotary = positions
    if cache.sections is not None:
        rotary = g.input("rotary", "int64", 3, "N")
    elif cache.first:
        rotary = g.input("rotary", "int64", "N")
    for layer in cache.indices:
        for kind in ("key", "value"):
            g.input(f"past_{kind}.{layer}", g.dtype, cache.kv_heads, "P", cache.head_dim)
    return embeddings, (*_rotation(g, rotary, cache), _causal_mask(g, positions, f"past_key.{cache.first}"))


def cached_attention(
    g: GraphBuilder, name: str, layer: int, qkv: Biased, positions: Positions, cache: CacheShape, last: bool
) -> str:
    heads, kv_heads, head_dim = cache.heads, cache.kv_heads, cache.head_dim
    cos, sin, mask = positions
    rotary = heads + kv_heads  # the heads of query and key; the value's follow
    packed = g.reshape(add_bias(g, qkv), f"{name}.heads", -1, rotary + kv_heads, head_dim)
    rotated = rotate(g, name, g.slice(packed, f"{name}.query_key", axis=1, end=rotary), cos, sin, head_dim)
    value = g.node(
        "Transpose", [g.slice(packed, f"{name}.value.slice", axis=1, begin=rotary)], f"{name}.value", perm=[1, 0, 2]
    )
    query = g.slice(rotated, f"{name}.query", axis=1, end=heads)  # [T, heads, head_dim] fp32
    key = g.narrow(g.slice(rotated, f"{name}.key.slice", axis=1, begin=heads), f"{name}.key.narrow")
    key = g.node("Transpose", [key], f"{name}.key", perm=[1, 0, 2])  # [kv_heads, T, head_dim]
    tokens = -1
    if last:
        query, tokens = _last(g, f"{name}.last_query", query, heads, head_dim), 1
        mask = g.slice(mask, f"{name}.last_mask", axis=0, begin=-1)
    joined = []  # each [kv_heads, 1, P + T, head_dim]
    for kind, new in (("key", key), ("value", value)):
        g.output(new, f"new_{kind}.{layer}", g.dtype, kv_heads, "N", head_dim)
        whole = g.node("Concat", [f"past_{kind}.{layer}", new], f"{name}.{kind}s", axis=1)
        joined.append(g.node("Unsqueeze", [whole, g.constant([1])], f"{name}.{kind}s.group"))
    grouped = g.reshape(query, f"{name}.groups", tokens, kv_heads, heads // kv_heads, head_dim)
    grouped = g.node("Transpose", [grouped], f"{name}.groups.transposed", perm=[1, 2, 0, 3])
    mixed = attend(g, name, grouped, joined[0], joined[1], head_dim, mask)  # [kv_heads, group, T, head_dim]
    if layer == cache.share:  # [P + T]
        share = g.slice(f"{name}.softmax", f"{name}.share.last", axis=2, begin=-1)
        share = g.mean(share, f"{name}.share.mean", 0, 1, keepdims=0)
        g.output(g.reshape(share, f"{name}.share", -1), "share", "float32", "S", first=True)
    mixed = g.node("Transpose", [mixed], f"{name}.transposed", perm=[2, 0, 1, 3])
    return g.reshape(mixed, name, tokens, heads * head_dim)


def last_position(g: GraphBuilder, name: str, x: str, width: int) -> str:
    return _last(g, name, x, width)


def added(g: GraphBuilder, x: str | Addition) -> str:
    """A sum that was still to be computed."""
    return x if isinstance(x, str) else g.node("Add", [x.residual, add_bias(g, x.branch)], x.name)


def _split_heads(g: GraphBuilder, name: str, qkv: Biased, tokens: int, heads: int, head_dim: int) -> list[str]:
    """Query, key and value, each [F, heads, T, head_dim]."""
    packed = g.reshape(add_bias(g, qkv), f"{name}.heads", -1, tokens, 3, heads, head_dim)
    parts = g.node("Transpose", [packed], f"{name}.parts", perm=[2, 0, 3, 1, 4])  # [3, F, heads, T, head_dim]
    return [
        g.reshape(
            g.slice(parts, f"{name}.{part}.slice", axis=0, begin=i, end=i + 1),
            f"{name}.{part}",
            *(-1, heads, tokens, head_dim),
        )
        for i, part in enumerate(("query", "key", "value"))
    ]


def _merge_heads(g: GraphBuilder, name: str, mixed: str, tokens: int, heads: int, head_dim: int) -> str:
    """[F, heads, T, head_dim] → [F, T, D]."""
    mixed = g.node("Transpose", [mixed], f"{name}.transposed", perm=[0, 2, 1, 3])
    return g.reshape(mixed, name, -1, tokens, heads * head_dim)


def attend(
    g: GraphBuilder, name: str, query: str, key: str, value: str, head_dim: int, mask: str | None = None, axes: int = 4
) -> str:
    """Scaled dot-product attention: query [·, ·, T, head_dim] fp32; key, value [·, ·, N, head_dim] → as the query.

    There may be more axes in front.
    """
    last = [*range(axes - 2), axes - 1, axes - 2]
    scaled = g.node("Mul", [query, _fp32(g, head_dim**-0.5)], f"{name}.query.scaled")
    turned = g.node("Transpose", [g.widen(key, f"{name}.key.fp32")], f"{name}.key.transposed", perm=last)
    scores = g.node("MatMul", [scaled, turned], f"{name}.scores")  # [·, ·, T, N] fp32
    if mask is not None:
        scores = g.node("Add", [scores, mask], f"{name}.masked")
    shares = g.narrow(g.node("Softmax", [scores], f"{name}.softmax", axis=-1), f"{name}.shares")
    return g.node("MatMul", [shares, value], f"{name}.mixed")


def rotary_frequencies(theta: float, dim: int) -> Array:
    """The frequencies of the rotary angles of ``dim`` elements, [dim / 2] fp32, rounded as transformers rounds them."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    return np.asarray(np.float32(1) / powers)


def _rotation(g: GraphBuilder, positions: str, cache: CacheShape) -> tuple[str, str]:
    """Cosines and sines of the rotary angles, [T, 1, head_dim] fp32, of positions [T], or [3, T] on three axes."""
    return cos_sin(g, "rotary", rotary_angles(g, positions, cache))


def rotary_angles(g: GraphBuilder, positions: str, cache: CacheShape) -> str:
    """The rotary angles [T, head_dim / 2] fp32 of positions [T], or [3, T] on three axes."""
    frequencies = frequency_weight(g, "rotary.inv_freq", cache.rope_theta, cache.head_dim)
    wide = g.node("Cast", [positions], "rotary.positions", to=TensorProto.FLOAT)
    if cache.sections is None:
        column = g.node("Unsqueeze", [wide, g.constant([1])], "rotary.column")
    else:  # each frequency turns by the position on its own axis: [T, head_dim / 2]
        axes = g.constant([axis for axis, width in enumerate(cache.sections) for _ in range(width)])
        column = g.node("Gather", [g.node("Transpose", [wide], "rotary.axes", perm=[1, 0]), axes], "rotary.own", axis=1)
    return g.node("Mul", [column, frequencies], "rotary.angles")


def cos_sin(g: GraphBuilder, name: str, angles: str) -> tuple[str, str]:
    """Cosines and sines [T, 1, d] of angles [T, d / 2], for each head and both halves of what is rotated."""
    angles = g.node("Concat", [angles, angles], f"{name}.both", axis=-1)
    angles = g.node("Unsqueeze", [angles, g.constant([1])], f"{name}.each_head")
    return g.node("Cos", [angles], f"{name}.cos"), g.node("Sin", [angles], f"{name}.sin")


def frequency_weight(g: GraphBuilder, name: str, theta: float, dim: int) -> str:
    return g.weight(Weight(name, (dim // 2,), "float32", {}, lambda _: rotary_frequencies(theta, dim)))


def rotate(g: GraphBuilder, name: str, x: str, cos: str, sin: str, head_dim: int, axis: int = 2) -> str:
    """Rotates [T, heads, head_dim] by the half-split rule, in fp32; ``axis`` is the last of more axes."""
    wide = g.widen(x, f"{name}.query_key.fp32")
    first = g.slice(wide, f"{name}.first_half", axis=axis, end=head_dim // 2)
    second = g.slice(wide, f"{name}.second_half", axis=axis, begin=head_dim // 2)
    swapped = g.node("Concat", [g.node("Neg", [second], f"{name}.negated"), first], f"{name}.swapped", axis=-1)
    parts = [g.node("Mul", [wide, cos], f"{name}.by_cos"), g.node("Mul", [swapped, sin], f"{name}.by_sin")]
    return g.node("Add", parts, f"{name}.rotated")


def _causal_mask(g: GraphBuilder, positions: str, past: str) -> str:
    """What may be attended to, as an addend of the scores: [T, P + T] fp32, 0 or the lowest finite number."""
    zero, one = g.constant(0), g.constant(1)

    def size(x: str, axis: str, name: str) -> str:
        return g.node("Gather", [g.node("Shape", [x], f"{name}.shape"), axis], name, axis=0)

    cached = size(past, one, "mask.cached")  # P
    total = g.node("Add", [cached, size(positions, zero, "mask.new")], "mask.total")
    slots = g.node("Range", [zero, total, one], "mask.slots")
    begin = g.node("Gather", [positions, zero], "mask.begin", axis=0)
    new = g.node("Add", [g.node("Sub", [slots, cached], "mask.offset"), begin], "mask.new_positions")
    in_cache = g.node("Less", [slots, cached], "mask.in_cache")
    filled = g.node("Less", [slots, begin], "mask.filled")
    never = g.constant(np.iinfo(np.int32).max)  # the position of an empty slot
    old = g.node("Where", [filled, slots, never], "mask.old_positions")
    keys = g.node("Where", [in_cache, old, new], "mask.keys")
    later = g.node("Greater", [keys, g.node("Unsqueeze", [positions, g.constant([1])], "mask.queries")], "mask.later")
    return g.node("Where", [later, _fp32(g, float(np.finfo(np.float32).min)), _fp32(g, 0.0)], "mask")


def _last(g: GraphBuilder, name: str, x: str, *shape: int) -> str:
    """The last of T positions, [T, *shape] → [1, *shape]: numbers, since TensorRT does not see that none is open."""
    return g.reshape(g.slice(x, f"{name}.slice", axis=0, begin=-1), name, 1, *shape)


def _fp32(g: GraphBuilder, value: float) -> str:
    return g.constant(value, "float32")
