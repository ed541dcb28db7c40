"""From the tower's patches to the decoder's tokens: LLaVA's projector and pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tango_export.graph.builder import Array, Float, GraphBuilder, Weight
from tango_export.layers import linear

PoolingMode = Literal["bilinear", "average"]


@dataclass(frozen=True)
class Pooling:
    """Pooling of a frame's patches to about a quarter as many tokens.

    Attributes:
        mode: ``bilinear`` interpolation to half of the side, rounded up; ``average`` over 2×2 patches, where an odd
            last row and column are left out.
        patches: Patches along one edge.
    """

    mode: PoolingMode
    patches: int

    @property
    def side(self) -> int:
        """Tokens along one edge."""
        return -(-self.patches // 2) if self.mode == "bilinear" else self.patches // 2

    def matrix(self) -> Array:
        """Pooling as a matrix, [tokens, patches] fp32; each row sums to 1 over at most four patches."""
        axis = _bilinear(self.patches, self.side) if self.mode == "bilinear" else _average(self.patches, self.side)
        return np.asarray(np.einsum("ip,jq->ijpq", axis, axis).reshape(self.side**2, self.patches**2))


def projector(g: GraphBuilder, x: str, vision_width: int, width: int, pooling: Pooling) -> str:
    """Linear, exact GELU, pooling, linear: [F, patches, vision width] → [F, tokens, D].

    Pooling is linear and its weights sum to 1, so it commutes with the second layer, which then runs on a quarter of
    the tokens.
    """
    first = linear(g, "projector.linear_1", x, vision_width, width, tokens=pooling.patches**2)
    hidden = g.form.gelu(g, "projector.gelu", first)
    pooled = pool(g, "projector.pool", hidden, pooling, g.dtype)
    return g.form.add_bias(g, linear(g, "projector.linear_2", pooled, width, width, tokens=pooling.side**2))


def pool(g: GraphBuilder, name: str, x: str, pooling: Pooling, dtype: Float) -> str:
    """[F, patches, D] → [F, tokens, D]."""
    shape = (pooling.side**2, pooling.patches**2)
    weight = Weight(f"{name}.weight", shape, dtype, {}, lambda _: pooling.matrix())
    return g.form.constant_matmul(g, name, g.weight(weight), x)


def _bilinear(patches: int, side: int) -> Array:
    """One axis of torch's ``interpolate(size=side, mode="bilinear", align_corners=False)``, bit for bit."""
    scale = np.float64(np.float32(patches) / np.float32(side))
    place = np.maximum(scale * (np.arange(side) + 0.5) - 0.5, 0).astype(np.float32)  # rounded once, as by an FMA
    low = place.astype(np.int64)
    upper = place - low.astype(np.float32)
    axis = np.zeros((side, patches), np.float32)
    np.add.at(axis, (np.arange(side), low), 1 - upper)
    np.add.at(axis, (np.arange(side), np.minimum(low + 1, patches - 1)), upper)
    return axis


def _average(patches: int, side: int) -> Array:
    """One axis of torch's ``avg_pool2d(x, 2)``."""
    axis = np.zeros((side, patches), np.float32)
    axis[:, : 2 * side] = np.kron(np.eye(side, dtype=np.float32), [0.5, 0.5])
    return axis
