"""From the tower's patches to the decoder's tokens: LLaVA's projector and pooling."""

from __future__ import annotations

import numpy as np

from tango_export.graph.builder import Array, Float, GraphBuilder, Weight
from tango_export.layers import linear


def projector(g: GraphBuilder, x: str, vision_width: int, width: int, side: int) -> str:
    """Linear, exact GELU, pooling, linear: [F, patches, vision width] → [F, tokens, D].

    Pooling is linear and its weights sum to 1, so it commutes with the second layer, which then runs on a quarter of
    the tokens.
    """
    first = linear(g, "projector.linear_1", x, vision_width, width, tokens=side**2)
    hidden = g.form.gelu(g, "projector.gelu", first)
    pooled = pool(g, "projector.pool", hidden, side, g.dtype)
    tokens = pooled_side(side) ** 2
    return g.form.add_bias(g, linear(g, "projector.linear_2", pooled, width, width, tokens=tokens))


def pool(g: GraphBuilder, name: str, x: str, side: int, dtype: Float) -> str:
    """Bilinear pooling of a patch grid to half its side, [F, patches, D] → [F, tokens, D]."""
    shape = (pooled_side(side) ** 2, side**2)
    weight = Weight(f"{name}.weight", shape, dtype, {}, lambda _: bilinear_pooling(side))
    return g.form.constant_matmul(g, name, g.weight(weight), x)


def pooled_side(side: int) -> int:
    """Tokens along one edge of the pooled grid."""
    return -(-side // 2)


def bilinear_pooling(side: int) -> Array:
    """Bilinear pooling as a matrix, [tokens, patches] fp32; each row sums to 1 over at most four patches.

    It is torch's ``interpolate(size=ceil(side / 2), mode="bilinear", align_corners=False)``, bit for bit.
    """
    half = pooled_side(side)
    scale = np.float64(np.float32(side) / np.float32(half))
    place = np.maximum(scale * (np.arange(half) + 0.5) - 0.5, 0).astype(np.float32)  # rounded once, as by an FMA
    low = place.astype(np.int64)
    upper = place - low.astype(np.float32)
    axis = np.zeros((half, side), np.float32)
    np.add.at(axis, (np.arange(half), low), 1 - upper)
    np.add.at(axis, (np.arange(half), np.minimum(low + 1, side - 1)), upper)
    return np.asarray(np.einsum("ip,jq->ijpq", axis, axis).reshape(half**2, side**2))
