"""The decoder's keys and values on the device: one buffer of fixed capacity, appended to by one copy a pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.device import ALIGNMENT, Pool, Stream, StridedRows
from tango_runtime.bundle import TensorSpec


class Cache:
    """Keys and values of every layer, [heads, capacity, width of a head] each, one behind the other.

    The decoder gives the rows of a pass as tensors of their own, [heads, N, width of a head]. These too are laid one
    behind the other, so that a single strided copy brings all of them into their places, whatever the number of layers.

    Args:
        cached: The cache's inputs of the decoder graph.
        rows: The outputs that bring new rows, in the same order.
        capacity: Positions.
        pool: Gives the memory.
        stream: Where the copies run.
    """

    def __init__(
        self, cached: Sequence[TensorSpec], rows: Sequence[TensorSpec], capacity: int, pool: Pool, stream: Stream
    ) -> None:
        self.capacity = capacity
        self._cached, self._rows = [t.name for t in cached], [t.name for t in rows]
        heads, _, width = cached[0].shape
        assert isinstance(heads, int)
        assert isinstance(width, int)
        self._heads, self._width, self._dtype = heads, width, np.dtype(cached[0].dtype)
        self._row = width * self._dtype.itemsize
        # Whole slabs of heads, so that each layer's begins where a tensor may begin.
        self._slab = _aligned_rows(heads, capacity * self._row)
        self._all = pool.take("cache", (len(cached), self._slab, capacity, width), self._dtype)
        self._pool, self._stream = pool, stream

    def clear(self, positions: int) -> None:
        """Zeroes the first positions: what an overflow left there would spoil sums, even at weight 0."""
        run, heads = self.capacity * self._row, len(self._cached) * self._slab
        self._stream.clear_columns(self._all.address, run, positions * self._row, heads)

    def held(self, length: int) -> dict[str, DeviceArray]:
        """The decoder's inputs: all of the cache, or an empty one where ``length`` is 0.

        Attention then is spared rows that would not count.
        """
        shape = (self._heads, self.capacity if length else 0, self._width)
        step = self._slab * self.capacity * self._row
        return _laid_out(self._cached, self._all.address, step, shape, self._dtype)

    def room(self, tokens: int, name: str = "rows") -> dict[str, DeviceArray]:
        """The decoder's outputs, for the rows of so many tokens.

        Args:
            tokens: N.
            name: Of the buffer in the pool.
        """
        slab = _aligned_rows(self._heads, tokens * self._row)
        all_rows = self._pool.take(name, (len(self._rows), slab, tokens, self._width), self._dtype)
        step = slab * tokens * self._row
        return _laid_out(self._rows, all_rows.address, step, (self._heads, tokens, self._width), self._dtype)

    def append(self, rows: dict[str, DeviceArray], length: int) -> None:
        """Copies what :meth:`room` was filled with behind the first ``length`` positions."""
        first = rows[self._rows[0]]
        run = first.shape[1] * self._row
        source = StridedRows(first.address, run, _aligned_rows(self._heads, run))
        to = StridedRows(self._all.address + length * self._row, self.capacity * self._row, self._slab)
        self._stream.copy_strided(source, to, len(self._rows), self._heads, run)


class InPlaceCache(Cache):
    """A cache that the decoder itself appends to: what it reads and what it writes are the same memory."""

    def room(self, tokens: int, name: str = "rows") -> dict[str, DeviceArray]:
        """All of the cache, where the decoder finds the place of the new rows itself."""
        return dict(zip(self._rows, self.held(self.capacity).values(), strict=True))

    def append(self, rows: dict[str, DeviceArray], length: int) -> None:
        """Nothing: the rows are where they belong."""


def _aligned_rows(rows: int, row: int) -> int:
    """The least number of rows of so many bytes, at least ``rows``, that ends at a multiple of the alignment."""
    step = ALIGNMENT // math.gcd(ALIGNMENT, row)
    return -(-rows // step) * step


def _laid_out(
    names: Sequence[str], address: int, step: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]
) -> dict[str, DeviceArray]:
    return {name: DeviceArray(address + i * step, shape, dtype.name) for i, name in enumerate(names)}
