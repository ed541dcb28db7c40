"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), for all matrices of a shape at once.

`torch.optim.Muon` updates matrix by matrix; with 90 small ones, its kernel launches alone take half of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Newton–Schulz coefficients and steps of that source.
_A, _B, _C, _STEPS = 3.4445, -4.775, 2.0315, 5


class Muon(torch.optim.Optimizer):
    """Moves each matrix by its orthogonalized momentum, scaled to the root mean square of AdamW's steps.

    Args:
        matrices: 2-D parameters.
        lr: Learning rate; it and ``weight_decay`` have AdamW's meaning (arXiv 2502.16982, section 2.2).
        weight_decay: Decoupled weight decay.
        momentum: Nesterov momentum.
    """

    def __init__(self, matrices: Sequence[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": alike} for alike in shapes.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; every matrix needs a gradient."""
        for group in self.param_groups:
            matrices = group["params"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            average = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - group["momentum"])
            update = orthogonalize(gradient.lerp(average, group["momentum"]))
            rate = 0.2 * max(update.shape[1:]) ** 0.5 * group["lr"]
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(update.to(gradient.dtype).unbind()), alpha=-rate)


def orthogonalize(matrices: Tensor) -> Tensor:
    """[N, R, C] → bf16, approximately the nearest matrices with orthonormal rows or columns."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x
