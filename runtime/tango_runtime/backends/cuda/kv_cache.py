"""Keys and values of a sequence on the device, appended to by one copy a pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.device import ALIGNMENT, Buffer, Pool, Stream, StridedRows
from tango_runtime.backends.cuda.runner import DeviceStep, SequenceRow
from tango_runtime.backends.rotary import TEXT
from tango_runtime.bundle import TensorSpec


class KVCache:
    """Keys and values of every layer, [heads, capacity, head_dim] each, contiguous, and the rows that are filled.

    The decoder gives the rows of a pass as tensors of their own, [heads, N, head_dim]. These are contiguous too, so a
    single strided copy brings all of them to their places, whatever the number of layers.

    Args:
        cached: The cache's inputs of the decoder graph.
        rows: The outputs that bring new rows, in the same order.
        capacity: Positions.
        in_place: The decoder itself puts new rows into the cache.
        stream: Where the copies run.
        released: Called when the cache is released.

    Attributes:
        capacity: Positions that there is room for.
        length: Positions that are filled.
        wanted: Positions that the sequence may come to have, as far as its user has said.
        state: An object that is another one after each change of what is filled.
        rotary: Rotary positions of the sequence.
        pool: Memory that lives as long as the cache.
        step: Its decode step, None until one is made.
        row: What steps of several sequences need of it, None until it is made.
    """

    def __init__(
        self,
        cached: Sequence[TensorSpec],
        rows: Sequence[TensorSpec],
        capacity: int,
        *,
        in_place: bool,
        stream: Stream,
        released: Callable[[KVCache], None],
    ) -> None:
        self._cached, self._rows = [t.name for t in cached], [t.name for t in rows]
        heads, _, head_dim = cached[0].shape
        assert isinstance(heads, int)
        assert isinstance(head_dim, int)
        self._heads, self._head_dim, self._dtype = heads, head_dim, np.dtype(cached[0].dtype)
        self._row = head_dim * self._dtype.itemsize
        self._in_place, self._stream, self._released = in_place, stream, released
        self.length = self._reached = 0  # the second: positions that were ever written since the cache was clear
        self.wanted, self.state = 0, object()
        self.rotary, self.pool = TEXT, Pool()
        self.step: DeviceStep | None = None
        self.row: SequenceRow | None = None
        self._allocate(capacity)

    def release(self) -> None:
        """Gives the cache back to its backend."""
        self.state = object()
        self._released(self)

    def rewind(self, length: int) -> None:
        """Forgets everything after the first positions.

        It is cleared, too: what an overflow left there would spoil sums, even at weight 0.
        """
        if self._reached > length:
            begin = self._buffer.address + length * self._row
            rows = len(self._cached) * self._slab
            self._stream.clear_columns(begin, self.capacity * self._row, (self._reached - length) * self._row, rows)
        self.length = self._reached = length
        self.state = object()

    def grow(self, capacity: int) -> None:
        """Makes room for more positions; the filled ones are kept."""
        old, filled = self._buffer, self._filled
        self._allocate(capacity)
        self._copy(filled, self.length)
        self._stream.synchronize()
        old.free()
        self.step = self.row = None
        self.state = object()

    def copy(self, other: KVCache, length: int) -> None:
        """Fills an empty cache with the first ``length`` positions of another."""
        self._copy(other._filled, length)
        self.advance(length)

    def held(self, length: int) -> dict[str, DeviceArray]:
        """The decoder's inputs: all of the cache, or an empty one where ``length`` is 0.

        An empty one spares attention the rows that would not count.
        """
        shape = (self._heads, self.capacity if length else 0, self._head_dim)
        return _views(self._cached, self._buffer.address, self._slab * self.capacity * self._row, shape, self._dtype)

    def room(self, tokens: int, pool: Pool, name: str = "rows") -> dict[str, DeviceArray]:
        """The decoder's outputs, for the rows of ``tokens`` tokens.

        Args:
            tokens: N.
            pool: Where their memory comes from, unless the decoder writes into the cache itself.
            name: Name of the buffer in the pool.
        """
        self.reach(tokens)  # a pass that fails may write some of them, too
        if self._in_place:
            return dict(zip(self._rows, self.held(self.capacity).values(), strict=True))
        slab = _aligned_rows(self._heads, tokens * self._row)
        rows = pool.take(name, (len(self._rows), slab, tokens, self._head_dim), self._dtype)
        shape = (self._heads, tokens, self._head_dim)
        return _views(self._rows, rows.address, slab * tokens * self._row, shape, self._dtype)

    def append(self, rows: dict[str, DeviceArray]) -> None:
        """Copies what :meth:`room` was filled with to its place after the filled positions, and counts it."""
        first = rows[self._rows[0]]
        run = first.shape[1] * self._row
        source = StridedRows(first.address, run, _aligned_rows(self._heads, run))
        to = StridedRows(self._buffer.address + self.length * self._row, self.capacity * self._row, self._slab)
        self._stream.copy_strided(source, to, len(self._rows), self._heads, run)

    def fill(self, rows: dict[str, DeviceArray], tokens: int) -> None:
        """Counts a pass over ``tokens`` tokens, and puts their rows in place if the decoder did not."""
        if not self._in_place:
            self.append(rows)
        self.advance(tokens)

    def advance(self, tokens: int) -> None:
        """Counts ``tokens`` more positions as filled."""
        self.reach(tokens)
        self.length += tokens
        self.state = object()

    def reach(self, tokens: int) -> None:
        """Says that ``tokens`` more positions may be written without being filled."""
        self._reached = max(self._reached, self.length + tokens)

    @property
    def _filled(self) -> StridedRows:
        """Where its rows are: each head's, one head after the other."""
        return StridedRows(self._buffer.address, self.capacity * self._row, self._slab)

    def _copy(self, source: StridedRows, length: int) -> None:
        if length:
            self._stream.copy_strided(source, self._filled, len(self._cached), self._heads, length * self._row)

    def _allocate(self, capacity: int) -> None:
        self.capacity = capacity
        # Whole slabs of heads, so that each layer's begins where a tensor may begin.
        self._slab = _aligned_rows(self._heads, capacity * self._row)
        self._buffer = Buffer(len(self._cached) * self._slab * capacity * self._row)


def _aligned_rows(rows: int, row: int) -> int:
    """The smallest number of rows of ``row`` bytes, at least ``rows``, that ends at a multiple of the alignment."""
    step = ALIGNMENT // math.gcd(ALIGNMENT, row)
    return -(-rows // step) * step


def _views(
    names: Sequence[str], address: int, step: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]
) -> dict[str, DeviceArray]:
    return {name: DeviceArray(address + i * step, shape, dtype.name) for i, name in enumerate(names)}
