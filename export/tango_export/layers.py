"""Layers that models share: each writes its nodes in the form of the graph, and returns its result.

Everything about numbers that may not overflow lies in the forms: norms and softmax are in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tango_export.graph.builder import Addition, Array, Biased, GraphBuilder, Linear, Read, Tokens, Weight


def linear(
    g: GraphBuilder,
    name: str,
    x: str,
    fan_in: int,
    fan_out: int,
    *,
    bias: bool = True,
    tokens: Tokens = None,
    patch: tuple[int, ...] = (),
    stored: tuple[int, int] | None = None,
    wide: bool = False,
) -> Biased:
    """``x @ weight + bias``, x: [..., in] → [..., out].

    A checkpoint stores [out, in]. The weight is transposed when it is written: ONNX has no transposed product above
    two dimensions.

    Args:
        g: The graph.
        name: Name of the layer.
        x: Its input.
        fan_in: Width of the input.
        fan_out: Width of the result.
        bias: Whether the layer has one.
        tokens: Tokens of a frame, where x is [F, tokens, in]; None where it is [T, in].
        patch: The checkpoint's shape of the input, where it stores a convolution's weight [out, *patch].
        stored: The checkpoint's (fan_in, fan_out), where they are smaller: zeros fill up the rest.
        wide: From a wide input to a wide result, with a weight as all others have it.
    """
    inputs, outputs = stored or (fan_in, fan_out)
    tensor = g.source(f"{name}.weight")

    def values(read: Read) -> Array:
        return _filled(read(tensor).reshape(outputs, -1).T, fan_in, fan_out)

    tensors = {tensor: (outputs, *(patch or (inputs,)))}
    weight = Weight(f"{name}.weight", (fan_in, fan_out), g.dtype, tensors, values)
    return product(g, name, x, weight, _bias(g, f"{name}.bias", outputs, fan_out, wide) if bias else None, tokens, wide)


def packed_linear(
    g: GraphBuilder, name: str, x: str, fan_in: int, parts: dict[str, int], *, tokens: int | None = None
) -> Biased:
    """Linear layers with the same input as one product: [..., in] → their results side by side.

    Args:
        g: The graph.
        name: Name of the product.
        x: The input.
        fan_in: Its width.
        parts: Width of each layer's result, by its name beside ``name``.
        tokens: As in :func:`linear`.
    """
    total, scope = sum(parts.values()), name.rpartition(".")[0]
    tensors = {g.source(f"{scope}.{part}.weight"): (width, fan_in) for part, width in parts.items()}
    biases = {g.source(f"{scope}.{part}.bias"): (width,) for part, width in parts.items()}

    def stacked(names: Iterable[str], read: Read) -> Array:
        return np.concatenate([read(tensor) for tensor in names]).T

    weight = Weight(f"{name}.weight", (fan_in, total), g.dtype, tensors, lambda read: stacked(tensors, read))
    bias = Weight(f"{name}.bias", (total,), g.dtype, biases, lambda read: stacked(biases, read))
    return product(g, name, x, weight, g.weight(bias), tokens)


def rms_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    """The norm of x without the mean, and x: [..., width] → twice the same."""
    normed, x = g.form.rms_norm(g, name, x, width, eps)
    g.scaled_by(normed, f"{name}.weight")
    return normed, x


def wide_rms_norm(g: GraphBuilder, name: str, x: str | Addition, width: int, eps: float) -> tuple[str, str]:
    """The same over a residual stream that is fp32; the norm is not."""
    normed, x = g.form.wide_rms_norm(g, name, x, width, eps)
    g.scaled_by(normed, f"{name}.weight")
    return normed, x


def self_attention(g: GraphBuilder, name: str, x: str, tokens: int, width: int, heads: int) -> Biased:
    """Attention among the tokens of a frame, [F, tokens, width] → the same."""
    parts = dict.fromkeys(("q_proj", "k_proj", "v_proj"), width)
    qkv = packed_linear(g, f"{name}.qkv_proj", x, width, parts, tokens=tokens)  # [F, tokens, 3·width]
    mixed = g.form.attention(g, name, qkv, tokens, heads, width // heads)  # [F, tokens, width]
    return linear(g, f"{name}.out_proj", mixed, width, width, tokens=tokens)


def gelu_mlp(g: GraphBuilder, name: str, x: str, tokens: int, width: int, inner: int) -> Biased:
    """Two linear layers around a GELU in its tanh form, [F, tokens, width] → the same."""
    first = linear(g, f"{name}.fc1", x, width, inner, tokens=tokens)
    hidden = g.form.gelu_tanh(g, f"{name}.gelu", first)  # [F, tokens, inner]
    return linear(g, f"{name}.fc2", hidden, inner, width, tokens=tokens)


def gated_mlp(g: GraphBuilder, name: str, x: str, width: int, inner: int) -> Biased:
    """SwiGLU, [..., width] → the same."""
    gate, up = (linear(g, f"{name}.{part}_proj", x, width, inner, bias=False) for part in ("gate", "up"))
    gated = g.form.swiglu(g, f"{name}.gated", gate, up, False)  # [..., inner]
    g.scaled_by(gated, f"{name}.up_proj.weight")
    return linear(g, f"{name}.down_proj", gated, inner, width, bias=False)


def _bias(g: GraphBuilder, name: str, stored: int, width: int, wide: bool) -> str:
    tensor = g.source(name)
    values = {tensor: (stored,)}
    return g.weight(
        Weight(name, (width,), "float32" if wide else g.dtype, values, lambda read: _filled(read(tensor), width))
    )


def _filled(values: Array, *shape: int) -> Array:
    """Values with zeros after them along each axis, up to a shape."""
    if values.shape == shape:
        return values
    filled = np.zeros(shape, values.dtype)
    filled[tuple(map(slice, values.shape))] = values
    return filled


def product(
    g: GraphBuilder, name: str, x: str, weight: Weight, bias: str | None, tokens: Tokens, wide: bool = False
) -> Biased:
    """A linear layer whose weight [in, out] and bias are made already; else as :func:`linear`."""
    fan_in, fan_out = weight.shape
    g.weight(weight)
    layer = Linear(name, x, f"{name}.matmul" if bias else name, fan_in, fan_out, tokens, wide=wide)
    return Biased(name, g.linear(layer), bias, wide)
