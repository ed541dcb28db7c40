"""The device form: standard ONNX, and the operators of the CUDA library (domain ``tango``).

What each operator takes and computes: :mod:`tango_export.graph.operators`. What each function here takes and returns:
:class:`tango_export.graph.builder.Form`.

What the portable form computes in fp32 stays there, inside of the operators: scores and softmax, norms, and the
rotation. New in fp16 are the rotated query, and its cosines and sines.

A decoder's cache grows in place: past and present rows are the same memory, of fixed capacity P, and rows after the
sequence do not count.
"""

from __future__ import annotations

import numpy as np

from tango_export.graph.builder import Addition, Array, Biased, CacheShape, GraphBuilder, Linear, Positions, Weight
from tango_export.graph.portable import rotary_frequencies
from tango_plugins import op

OPSETS = {"": 17, op.DOMAIN: 1}


def linear(g: GraphBuilder, layer: Linear) -> str:
    return g.node("MatMul", [layer.input, layer.weight], layer.output)


def add_bias(g: GraphBuilder, x: Biased) -> str:
    return x.value if x.bias is None else _operator(g, "Bias", [x.value, x.bias], x.name)


def layer_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    weights = [g.parameter(f"{name}.{kind}", width, dtype="float32") for kind in ("weight", "bias")]
    if isinstance(x, str):
        return _operator(g, "LayerNorm", [x, *weights], name, epsilon=eps), x
    assert x.branch.bias is not None, f"{x.name}: a branch before a layer norm has a bias"
    inputs = [x.residual, x.branch.value, x.branch.bias, *weights]
    return _operator(g, "AddLayerNorm", inputs, name, x.name, epsilon=eps), x.name


def rms_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    weight = g.parameter(f"{name}.weight", width, dtype="float32")
    if isinstance(x, str):
        return _operator(g, "RMSNorm", [x, weight], name, epsilon=eps), x
    inputs = [x.residual, add_bias(g, x.branch), weight]
    return _operator(g, "AddRMSNorm", inputs, name, x.name, epsilon=eps), x.name


def gelu(g: GraphBuilder, name: str, x: Biased) -> str:
    return _operator(g, "BiasGelu", [x.value, _bias_of(x)], name)


def gelu_tanh(g: GraphBuilder, name: str, x: Biased) -> str:
    return _operator(g, "BiasFastGelu", [x.value, _bias_of(x)], name)


def swiglu(g: GraphBuilder, name: str, gate: str, up: str) -> str:
    return _operator(g, "SwiGLU", [gate, up], name)


def attention(g: GraphBuilder, name: str, qkv: Biased, tokens: int, heads: int, head_dim: int) -> str:
    return _operator(g, "VisionAttention", [qkv.value, _bias_of(qkv)], name, num_heads=heads)


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
    embeddings = g.input("embeddings", g.dtype, "N", width)
    last = g.input("last_position", "int32", 1)
    for layer in range(cache.layers):
        for kind in ("key", "value"):
            g.input(f"past_{kind}.{layer}", g.dtype, cache.kv_heads, "P", cache.head_dim)
    return embeddings, (last, _angles(g, cache, "cos"), _angles(g, cache, "sin"))


def cached_attention(
    g: GraphBuilder, name: str, layer: int, qkv: Biased, positions: Positions, cache: CacheShape, last: bool
) -> str:
    kinds = ("key", "value")
    inputs = [qkv.value, _bias_of(qkv), *(f"past_{kind}.{layer}" for kind in kinds), *positions]
    rows = [f"{name}.present_{kind}" for kind in kinds]
    mixed = f"{name}.all" if last else name
    _operator(g, "CachedAttention", inputs, mixed, *rows, num_heads=cache.heads, kv_num_heads=cache.kv_heads)
    for kind, row in zip(kinds, rows, strict=True):
        g.output(row, f"present_{kind}.{layer}", g.dtype, cache.kv_heads, "P", cache.head_dim)
    return last_position(g, name, mixed, cache.heads * cache.head_dim) if last else mixed


def last_position(g: GraphBuilder, name: str, x: str, width: int) -> str:
    return g.slice(x, name, axis=0, begin=-1)


def _operator(g: GraphBuilder, kind: str, inputs: list[str], name: str, *more: str, **attributes: object) -> str:
    return g.node(kind, inputs, name, *more, domain=op.DOMAIN, **attributes, **op.PLUGIN_ATTRIBUTES)


def _bias_of(x: Biased) -> str:
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
