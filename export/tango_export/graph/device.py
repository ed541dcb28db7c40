"""The device form: for ONNX Runtime's CUDA provider, in its fused operators and in those of the CUDA library.

A graph defines the library's operators (domain ``tango``; plugins/tango_plugins/native/adapters) as ONNX functions, so
that it also runs without the library: on a CPU, where `tango validate` compares it.

What the portable form computes in fp32 stays there, inside of the operators: scores and softmax, the sums of the norms
(before microsoft/onnxruntime#28682 only in the strict mode that the runtime asks for), and the rotation. New in fp16
are the rotated query, its cosines and sines, and the norms' weights. What each function takes and returns: `Form`.

Inside of a decoder there is a batch of one sequence. Its cache grows in place: past and present rows are the same
memory, of fixed capacity P, and rows after the sequence do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, helper

from tango_export.graph.builder import Addition, Array, Biased, CacheShape, GraphBuilder, Positions, Weight
from tango_export.graph.portable import rotary_frequencies
from tango_plugins import op

#: ONNX Runtime's own operators (docs/ContribOperators.md in its repository), and those of the CUDA library.
_ORT, _TANGO = "com.microsoft", op.DOMAIN

OPSETS = {"": 17, _ORT: 1, _TANGO: 1}

#: How long the sequence is after a pass, as GroupQueryAttention wants it: on the device the last position; on the host
#: a bound of the length, which says how the work is divided and whether the cache is empty.
_LENGTHS = ("seqlens_k", "total_sequence_length")

_HEADS = ("num_heads", "kv_num_heads")


def add_bias(g: GraphBuilder, x: Biased) -> str:
    return x.value if x.bias is None else g.node("Bias", [x.value, x.bias], x.name, domain=_TANGO)


def layer_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    weights = [g.parameter(f"{name}.{kind}", width) for kind in ("weight", "bias")]
    return _norm(g, name, "LayerNormalization", x, weights, eps)


def rms_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    return _norm(g, name, "SimplifiedLayerNormalization", x, [g.parameter(f"{name}.weight", width)], eps)


def gelu(g: GraphBuilder, name: str, x: Biased) -> str:
    return g.node("BiasGelu", [x.value, x.bias or ""], name, domain=_ORT)


def gelu_tanh(g: GraphBuilder, name: str, x: Biased) -> str:
    return g.node("BiasFastGelu", [x.value, x.bias or ""], name, domain=_TANGO)


def swiglu(g: GraphBuilder, name: str, gate: str, up: str) -> str:
    return g.node("SwiGLU", [gate, up], name, domain=_TANGO)


def attention(
    g: GraphBuilder, name: str, query: Biased, key: Biased, value: Biased, tokens: int, heads: int, head_dim: int
) -> Biased:
    """Adds only the query's bias.

    <q, k + b> = <q, k> + <q, b>: the last term is the same for every key of a query and leaves the softmax as it is.
    The softmax's weights sum to 1, so Σ w·(v + b) = Σ w·v + b: the value's bias is left to the next layer.
    """
    inputs = [add_bias(g, query), key.value, value.value]
    mixed = g.node("MultiHeadAttention", inputs, f"{name}.mixed", domain=_ORT, num_heads=heads)
    return Biased(name, mixed, value.bias)


def constant_matmul(g: GraphBuilder, name: str, weight: str, x: str) -> str:
    """The constant is repeated for every frame, so that both operands are batches of one length.

    ONNX Runtime strides through such. Through others it goes by lists of addresses, which it keeps in pinned memory
    until a run that waits for its end, or until the session goes, when freeing them aborts the process.
    """
    frames = g.node("Shape", [x], f"{name}.frames", start=0, end=1)
    shape = g.node("Concat", [frames, g.constant(g.weights[weight].shape)], f"{name}.shape", axis=0)
    return g.node("MatMul", [g.node("Expand", [weight, shape], f"{name}.repeated"), x], name)


def start_decoder(g: GraphBuilder, width: int, cache: CacheShape) -> tuple[str, Positions]:
    embeddings = g.input("embeddings", g.dtype, "N", width)
    lengths = [g.input(name, "int32", 1) for name in _LENGTHS]
    for layer in range(cache.layers):
        for kind in ("key", "value"):
            g.input(f"past_{kind}.{layer}", g.dtype, 1, cache.kv_heads, "P", cache.head_dim)
    batched = g.node("Unsqueeze", [embeddings, g.constant([0])], "embeddings.batched")
    return batched, (*lengths, _angles(g, cache, "cos"), _angles(g, cache, "sin"))


def cached_attention(
    g: GraphBuilder, name: str, layer: int, qkv: Biased, positions: Positions, cache: CacheShape, last: bool
) -> str:
    kinds = ("key", "value")
    inputs = [qkv.value, qkv.bias or "", *(f"past_{kind}.{layer}" for kind in kinds), *positions]
    rows = [f"{name}.present_{kind}" for kind in kinds]
    mixed = f"{name}.all" if last else name
    heads = dict(zip(_HEADS, (cache.heads, cache.kv_heads), strict=True))
    g.node("CachedAttention", inputs, mixed, *rows, domain=_TANGO, **heads)
    for kind, row in zip(kinds, rows, strict=True):
        g.output(row, f"present_{kind}.{layer}", g.dtype, 1, cache.kv_heads, "P", cache.head_dim)
    return g.slice(mixed, name, axis=1, begin=-1) if last else mixed


def last_position(g: GraphBuilder, name: str, x: str, width: int) -> str:
    return g.slice(x, name, axis=1, begin=-1)


def _norm(g: GraphBuilder, name: str, kind: str, x: str | Addition, weights: list[str], eps: float) -> tuple[str, str]:
    """One node for a norm, with the residual sum before it and the bias of that where these are."""
    if isinstance(x, str):
        return g.node(kind, [x, *weights], name, epsilon=eps), x
    bias = [] if x.branch.bias is None else [x.branch.bias]
    inputs = [x.residual, x.branch.value, *weights, *bias]
    # no mean, no deviation, but the sum
    return g.node(f"Skip{kind}", inputs, name, "", "", x.name, domain=_ORT, epsilon=eps), x.name


def _angles(g: GraphBuilder, cache: CacheShape, kind: str) -> str:
    """Cosines or sines of the rotary angles of every position, [context, head_dim / 2]."""

    def values() -> Array:
        angles = np.arange(cache.context, dtype=np.float32)[:, None] * rotary_frequencies(cache)
        return np.asarray(np.cos(angles) if kind == "cos" else np.sin(angles))

    shape = (cache.context, cache.head_dim // 2)
    return g.weight(Weight(f"rotary.{kind}", shape, g.dtype, {}, lambda _: values()))


def _function(name: str, inputs: Sequence[str], outputs: Sequence[str], *nodes: NodeProto) -> FunctionProto:
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
    attributes = {attribute.ref_attr_name for node in nodes for attribute in node.attribute} - {""}
    return helper.make_function(_TANGO, name, inputs, outputs, nodes, opsets, sorted(attributes))


def _grouped_query_attention() -> NodeProto:
    """ONNX Runtime's attention of grouped queries over a cache, with the heads of the enclosing function."""
    inputs = ["biased", "", "", "past_key", "past_value", "last", "total", "cosines", "sines"]
    node = helper.make_node(
        "GroupQueryAttention", inputs, ["mixed", "present_key", "present_value"], domain=_ORT, do_rotary=1
    )
    node.attribute.extend(AttributeProto(name=name, type=AttributeProto.INT, ref_attr_name=name) for name in _HEADS)
    return node


#: What the CUDA library's operators take and compute.
OP_FUNCTIONS = {
    function.name: function
    for function in (
        _function("Bias", ["x", "bias"], ["y"], helper.make_node("Add", ["x", "bias"], ["y"])),
        _function(
            "BiasFastGelu", ["x", "bias"], ["y"], helper.make_node("FastGelu", ["x", "bias"], ["y"], domain=_ORT)
        ),
        _function(
            "SwiGLU",
            ["gate", "up"],
            ["y"],
            helper.make_node("QuickGelu", ["gate"], ["silu"], domain=_ORT, alpha=1.0),
            helper.make_node("Mul", ["silu", "up"], ["y"]),
        ),
        _function(
            "CachedAttention",
            ["packed", "bias", "past_key", "past_value", "last", "total", "cosines", "sines"],
            ["mixed", "present_key", "present_value"],
            helper.make_node("Add", ["packed", "bias"], ["biased"]),
            _grouped_query_attention(),
        ),
    )
}
