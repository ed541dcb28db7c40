"""What the towers and the decoder share: linear layers, norms in fp32, attention that stays finite in fp16."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """``x @ weight + bias`` with the weight as [in, out].

    A checkpoint stores [out, in]; ONNX has no transposed product above two dimensions, so the weight is turned once,
    when it is written, and never at run time.

    Attributes:
        stored_shape: Shape of the weight in a checkpoint.
    """

    def __init__(self, fan_in: int, fan_out: int, dtype: torch.dtype, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_in, fan_out, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(fan_out, dtype=dtype)) if bias else None
        self.stored_shape: tuple[int, ...] = (fan_out, fan_in)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


class PackedLinear(Linear):
    """Linear layers that take the same input, as one product: their weights and biases stand side by side.

    Attributes:
        parts: Width that each of them gives, by what a checkpoint calls it, in their order in the result.
    """

    def __init__(self, fan_in: int, dtype: torch.dtype, **parts: int) -> None:
        super().__init__(fan_in, sum(parts.values()), dtype)
        self.parts = parts


class LayerNorm(nn.Module):
    """Layer normalisation in fp32, whatever comes in; it gives back the dtype that it got."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → the same."""
        return nn.functional.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in fp32: residual channels of 1e4 square to more than fp16 holds."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → the same."""
        wide = x.float()
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, width: int, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention whose scores never pass through fp16.

    The query is scaled before the product, and product and softmax are in fp32: with key biases of ±150, as Qwen2
    has them, the scores overflow in fp16.

    Args:
        query: [..., T, width of a head], fp32 or fp16.
        key: [..., N, width of a head].
        value: [..., N, width of a head].
        width: Width of a head; a number, since a size read from a tensor would be computed in the graph.
        mask: [T, N] fp32, added to the scores.

    Returns:
        [..., T, width of a head] in the dtype of ``value``.
    """
    scores = (query.float() * width**-0.5) @ key.float().transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    mixed: Tensor = scores.softmax(-1).to(value.dtype) @ value
    return mixed
