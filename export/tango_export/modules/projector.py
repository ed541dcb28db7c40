"""From the tower's patches to the decoder's tokens: projector and 2×2 pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tango_export.modules.layers import Linear


class Pool(nn.Module):
    """Bilinear pooling of a patch grid to half its side, as one constant matrix over patches.

    It is LLaVA-OneVision's ``interpolate(size=ceil(side / 2), mode="bilinear", align_corners=False)``.
    """

    def __init__(self, side: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.side = side
        self.tokens = pooled_side(side) ** 2
        self.weight = nn.Parameter(torch.empty(self.tokens, side**2, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[F, patches, width] → [F, tokens, width]."""
        return self.weight @ x

    def matrix(self) -> Tensor:
        """The constant, [tokens, patches] fp32; each row sums to 1 over at most four patches."""
        side, half = self.side, pooled_side(self.side)
        grids = torch.eye(side**2).reshape(side**2, 1, side, side)
        pooled = nn.functional.interpolate(grids, size=(half, half), mode="bilinear", align_corners=False)
        return pooled.reshape(side**2, half**2).T.contiguous()


def pooled_side(side: int) -> int:
    """Tokens along one edge of the pooled grid."""
    return -(-side // 2)


class Projector(nn.Module):
    """Linear, GELU (exact), linear, with the pooling between the last two.

    Pooling is linear and its weights sum to 1, so it commutes with the second layer, which then runs on a quarter of
    the tokens.
    """

    def __init__(self, vision: int, width: int, pool: Pool, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = Linear(vision, width, dtype)
        self.pool = pool
        self.linear_2 = Linear(width, width, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[F, patches, vision width] → [F, tokens, decoder width]."""
        return self.linear_2(self.pool(nn.functional.gelu(self.linear_1(x))))
