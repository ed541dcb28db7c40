"""The device form: standard ONNX, and the operators of the CUDA library (domain ``tango``).

What each operator takes and computes: :mod:`tango_export.graph.operators`. What each function here takes and returns:
:class:`tango_export.graph.builder.Form`.

What the portable form computes in fp32 stays there, inside of the operators: scores and softmax, norms, and the
rotation. New in fp16 are the rotated query, and a decoder's cosines and sines.

A wide value, which fp16 may not hold, is fp16 here too, divided by a power of two: a product by a matrix in fp16 gives
another such, and the norm of the fp32 stream that reads it multiplies it again. In a graph of fp32 it is as it is.

A decoder's cache grows in place: past and present rows are the same memory, of fixed capacity P, and rows after the
sequence do not count.
"""

from __future__ import annotations

import numpy as np

from tango_export.graph.builder import Addition, Array, Biased, CacheShape, GraphBuilder, Linear, Positions, Weight
from tango_export.graph.portable import rotary_angles, rotary_frequencies
from tango_plugins import op

OPSETS = {"": 17, op.DOMAIN: 1}

#: Operators that no engine of TensorRT was built with: it takes the portable form of their graphs.
UNTRIED_IN_TENSORRT = frozenset(
    (
        *("Patches", "FrameAttention", "WindowAttention", "PositionedAttention", "AttentionShares"),
        *("Int8Linear", "Fp8Linear", "Fp8LinearGelu"),
    )
)

#: What wide values are divided by in fp16: up to 1.6e7 fit, and what is lost of the smallest is below 1e-5.
WIDE_SCALE = 256.0


def linear(g: GraphBuilder, layer: Linear) -> str:
    """In fp16 an operator, since TensorRT may sum a MatMul in fp16."""
    inputs = [layer.input, layer.weight]
    if g.dtype == "float32":
        return g.node("MatMul", inputs, layer.output)
    return operator(g, "Linear", inputs, layer.output)


def add_bias(g: GraphBuilder, x: Biased) -> str:
    if x.bias is None:
        return x.value
    return x.name if g.has(x.name) else operator(g, "Bias", [x.value, x.bias], x.name)


def layer_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    weights = [g.parameter(f"{name}.{kind}", width, dtype="float32") for kind in ("weight", "bias")]
    if isinstance(x, str):
        return operator(g, "LayerNorm", [x, *weights], name, epsilon=eps), x
    assert x.branch.bias is not None, f"{x.name}: a branch before a layer norm has a bias"
    inputs = [x.residual, x.branch.value, x.branch.bias, *weights]
    return operator(g, "AddLayerNorm", inputs, name, x.name, epsilon=eps), x.name


def rms_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    weight = g.parameter(f"{name}.weight", width, dtype="float32")
    if isinstance(x, str):
        return operator(g, "RMSNorm", [x, weight], name, epsilon=eps), x
    inputs = [x.residual, add_bias(g, x.branch), weight]
    return operator(g, "AddRMSNorm", inputs, name, x.name, epsilon=eps), x.name


def wide_rms_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    if g.dtype == "float32":
        return rms_norm(g, name, x, width, eps)
    weight = g.parameter(f"{name}.weight", width, dtype="float32")
    if isinstance(x, str):
        return operator(g, "WideRMSNorm", [x, weight], name, epsilon=eps), x
    inputs, scale = [x.residual, x.branch.value, bias_of(x.branch), weight], WIDE_SCALE if x.branch.wide else 1.0
    return operator(g, "AddWideRMSNorm", inputs, name, x.name, epsilon=eps, scale=scale), x.name


def gelu(g: GraphBuilder, name: str, x: Biased) -> str:
    return operator(g, "BiasGelu", [x.value, bias_of(x)], name)


def gelu_tanh(g: GraphBuilder, name: str, x: Biased) -> str:
    return operator(g, "BiasFastGelu", [x.value, bias_of(x)], name)


def swiglu(g: GraphBuilder, name: str, gate: Biased, up: Biased, wide: bool) -> str:
    if gate.bias is None and up.bias is None:
        return operator(g, "SwiGLU", [gate.value, up.value], name)
    inputs = [gate.value, bias_of(gate), up.value, bias_of(up)]
    scale = 1 / WIDE_SCALE if wide and g.dtype == "float16" else 1.0
    return operator(g, "BiasSwiGLU", inputs, name, scale=scale)


def attention(g: GraphBuilder, name: str, qkv: Biased, tokens: int, heads: int, head_dim: int) -> str:
    return operator(g, "VisionAttention", [qkv.value, bias_of(qkv)], name, num_heads=heads)


def constant_matmul(g: GraphBuilder, name: str, weight: str, x: str) -> str:
    """The constant is repeated for every frame, so that both operands are batches of one length.

    ONNX Runtime strides through such. Through others it goes by lists of addresses, which it keeps in pinned memory
    until a run that waits for its end, or until the session goes, when freeing them aborts the process.
    """
    # TensorRT 8 gives the whole shape whatever part of it Shape is asked for.
    frames = g.slice(g.node("Shape", [x], f"{name}.sizes"), f"{name}.frames", axis=0, begin=0, end=1)
    shape = g.node("Concat", [frames, g.constant(g.weights[weight].shape)], f"{name}.shape", axis=0)
    return g.node("MatMul", [g.node("Expand", [weight, shape], f"{name}.repeated"), x], name)


def start_decoder(g: GraphBuilder, width: int, cache: CacheShape) -> tuple[str, Positions]:
    """Cosines and sines are those of every position, or of the tokens of the pass where these have rotary positions."""
    embeddings = g.input("rows" if cache.first else "embeddings", g.dtype, "N", width)
    last = g.input("last_position", "int32", 1)
    if cache.is_positioned:
        rotary = g.input("rotary", "int32", *((3, "N") if cache.sections else ("N",)))
    for layer in cache.indices:
        for kind in ("key", "value"):
            g.input(f"past_{kind}.{layer}", g.dtype, cache.kv_heads, "P", cache.head_dim)
    if not cache.is_positioned:
        return embeddings, (last, _angles(g, cache, "cos"), _angles(g, cache, "sin"))
    angles = rotary_angles(g, rotary, cache)
    turns = (g.node(kind, [angles], f"rotary.{kind.lower()}.fp32") for kind in ("Cos", "Sin"))
    return embeddings, (last, *(g.narrow(turn, turn.removesuffix(".fp32")) for turn in turns))


def cached_attention(
    g: GraphBuilder, name: str, layer: int, qkv: Biased, positions: Positions, cache: CacheShape, last: bool
) -> str:
    kinds = ("key", "value")
    inputs = [qkv.value, bias_of(qkv), *(f"past_{kind}.{layer}" for kind in kinds), *positions]
    rows = [f"{name}.present_{kind}" for kind in kinds]
    mixed = f"{name}.all" if last else name
    heads = {"num_heads": cache.heads, "kv_num_heads": cache.kv_heads}
    operator(g, "PositionedAttention" if cache.is_positioned else "CachedAttention", inputs, mixed, *rows, **heads)
    for kind, row in zip(kinds, rows, strict=True):
        g.output(row, f"present_{kind}.{layer}", g.dtype, cache.kv_heads, "P", cache.head_dim)
    if layer == cache.share:
        assert not cache.is_positioned, "the layers before tokens are dropped have positions of one axis"
        shares = operator(g, "AttentionShares", [*inputs[:2], rows[0], *positions], f"{name}.shares", **heads)
        g.output(g.mean(shares, f"{name}.share", 0, keepdims=0), "share", "float32", "P", first=True)
    return last_position(g, name, mixed, cache.heads * cache.head_dim) if last else mixed


def last_position(g: GraphBuilder, name: str, x: str, width: int) -> str:
    return g.slice(x, name, axis=0, begin=-1)


def operator(g: GraphBuilder, kind: str, inputs: list[str], name: str, *more: str, **attributes: object) -> str:
    """Writes a node of one of the library's operators; arguments as of :meth:`GraphBuilder.node`."""
    return g.node(kind, inputs, name, *more, domain=op.DOMAIN, **attributes, **op.PLUGIN_ATTRIBUTES)


def bias_of(x: Biased) -> str:
    """The bias of a value that has one."""
    assert x.bias is not None, f"{x.name} has no bias, which its operator takes"
    return x.bias


def _angles(g: GraphBuilder, cache: CacheShape, kind: str) -> str:
    """Cosines or sines of the rotary angles of every position, [context, head_dim / 2]."""

    def values() -> Array:
        frequencies = rotary_frequencies(cache.rope_theta, cache.head_dim)
        angles = np.arange(cache.context, dtype=np.float32)[:, None] * frequencies
        return np.asarray(np.cos(angles) if kind == "cos" else np.sin(angles))

    shape = (cache.context, cache.head_dim // 2)
    return g.weight(Weight(f"rotary.{kind}", shape, g.dtype, {}, lambda _: values()))
