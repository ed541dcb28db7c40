"""Statistics of activations, and the ranges of their 8-bit values.

Ranges cover the largest magnitude seen (min-max). Methods that clip it lose more: a transformer's signal is in its few
large activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class ChannelStats:
    """Statistics of the channels of several activation tensors.

    Attributes:
        amax: Largest magnitude of each channel, for each tensor [channels] fp32.
        square_sums: Sum of squares of each channel, for each tensor [channels] fp64.
        rows: Number of rows seen, for each tensor.
    """

    amax: list[NDArray[np.float32]]
    square_sums: list[NDArray[np.float64]]
    rows: list[int]

    @classmethod
    def of(cls, tensors: Sequence[Array]) -> ChannelStats:
        """Statistics of one forward pass, tensors [..., channels]."""
        rows = [tensor.reshape(-1, tensor.shape[-1]).astype(np.float32) for tensor in tensors]
        return cls(
            [np.abs(x).max(0) for x in rows],
            [np.square(x, dtype=np.float64).sum(0) for x in rows],
            list(map(len, rows)),
        )

    def merge(self, other: ChannelStats) -> ChannelStats:
        """Statistics of both sets of rows together."""
        return ChannelStats(
            [np.maximum(a, b) for a, b in zip(self.amax, other.amax, strict=True)],
            [a + b for a, b in zip(self.square_sums, other.square_sums, strict=True)],
            [a + b for a, b in zip(self.rows, other.rows, strict=True)],
        )

    @classmethod
    def joined(cls, parts: Iterable[ChannelStats]) -> ChannelStats:
        """Statistics of the tensors of all parts, in order."""
        amax, square_sums, rows = zip(*((part.amax, part.square_sums, part.rows) for part in parts), strict=True)
        return cls(*(list(chain.from_iterable(lists)) for lists in (amax, square_sums, rows)))

    def mean_squares(self) -> list[NDArray[np.float32]]:
        """Mean square of each channel, for each tensor [channels]."""
        return [(s / max(n, 1)).astype(np.float32) for s, n in zip(self.square_sums, self.rows, strict=True)]

    def ranges(self, divisors: Sequence[Array | float]) -> list[float]:
        """Largest magnitude of each tensor after its channels are divided.

        Args:
            divisors: For each tensor, powers of two [channels], or one for all channels. Such a division is exact, so
                no second pass over the activations is needed.
        """
        return [float((amax / d).max()) for amax, d in zip(self.amax, divisors, strict=True)]
