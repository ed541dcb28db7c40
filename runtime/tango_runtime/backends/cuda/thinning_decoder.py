"""The decoder with inner pruning on a GPU: two graphs, and the CUDA library between them.

The lower graph reads a whole prompt before the upper one begins. A decode step is a pass of both over one token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from tango_plugins.device_array import DeviceArray
from tango_plugins.thinner import CudaThinner
from tango_plugins.thinning import Thinning
from tango_runtime.backends.base import require_context
from tango_runtime.backends.cuda.decoder import aligned_below, rounded, too_small
from tango_runtime.backends.cuda.device import Buffer, Pool, Stream, rows
from tango_runtime.backends.cuda.embedder import Embedder, Piece, TokenIds
from tango_runtime.backends.cuda.kv_cache import KVCache
from tango_runtime.backends.cuda.logits import DeviceLogits, Greatest
from tango_runtime.backends.cuda.row_ends import enqueue_gather
from tango_runtime.backends.cuda.runner import GraphRunner
from tango_runtime.backends.ort_cpu import cache_inputs, cache_rows
from tango_runtime.backends.rotary import TEXT, RotaryIds
from tango_runtime.backends.thinned_cache import ThinnedCache
from tango_runtime.bundle import GraphName, Manifest


class DeviceThinnedCache(ThinnedCache):
    """A sequence on the device.

    Attributes:
        rows: [capacity, D], what the lower layers gave for each position.
    """

    def __init__(
        self, low: KVCache, high: KVCache, rows: DeviceArray, memory: Buffer, released: Callable[[ThinnedCache], None]
    ) -> None:
        super().__init__(low, high)
        self.rows, self._memory, self._released = rows, memory, released

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self.rows.shape[0]

    def replace_rows(self, rows: DeviceArray, memory: Buffer) -> None:
        """Takes other memory for the rows."""
        self._memory.free()
        self.rows, self._memory = rows, memory

    def release(self) -> None:
        """Gives the cache back to its decoder."""
        self._released(self)


class ThinningDecoder:
    """Runs the two graphs over sequences; arguments, methods and errors as of
    :class:`tango_runtime.backends.cuda.decoder.Decoder`."""

    def __init__(self, manifest: Manifest, graphs: GraphRunner, embedder: Embedder, stream: Stream, pool: Pool) -> None:
        self._graphs, self._embedder, self._stream, self._pool = graphs, embedder, stream, pool
        self._specs = {name: manifest.graphs[name] for name in manifest.decoders}
        self._width, self._dtype = manifest.decoder.hidden_size, manifest.dtype
        self._context = manifest.decoder.context
        self._thinner = functools.cache(CudaThinner)
        (vocabulary,) = self._specs["decoder_high"].outputs[0].shape
        logits = pool.take("logits", (int(vocabulary),), np.float32)
        self._logits = DeviceLogits(logits, Greatest(stream), stream)
        self._all_positions = {name: self._positions_of(name) for name in self._specs}
        self._free: DeviceThinnedCache | None = None  # its memory serves the next sequence
        self.sequences = 1

    def batch(self, sequences: int) -> None:
        """Nothing: a step is a pass of the graphs over one sequence."""

    def new_cache(self, capacity: int, rotary: RotaryIds = TEXT) -> DeviceThinnedCache:
        """An empty sequence with room for ``capacity`` positions."""
        fixed = self._graphs.capacity
        if fixed is not None and capacity > fixed:
            raise too_small(capacity, fixed)
        wanted = fixed or rounded(capacity)
        if self._free is not None and self._free.capacity == wanted:
            cache, self._free = self._free, None
            cache.rewind(0)
            return cache
        self._free = None
        low, high = (self._kv_cache(name, wanted) for name in ("decoder_low", "decoder_high"))
        memory = Buffer(wanted * self._width * np.dtype(self._dtype).itemsize)
        return DeviceThinnedCache(low, high, memory.view((wanted, self._width), self._dtype), memory, self._take_back)

    def reserve(self, cache: DeviceThinnedCache, positions: int) -> None:
        """Makes room for ``positions`` positions in all."""
        if positions <= cache.capacity:
            return
        if self._graphs.capacity is not None:
            raise too_small(positions, cache.capacity)
        capacity = rounded(positions)
        for part in (cache.low, cache.high):
            part.grow(capacity)
        memory = Buffer(capacity * self._width * np.dtype(self._dtype).itemsize)
        whole = memory.view((capacity, self._width), self._dtype)
        self._stream.copy(cache.rows, rows(whole, 0, cache.capacity))
        self._stream.synchronize()
        cache.replace_rows(whole, memory)

    def extend(
        self, cache: DeviceThinnedCache, pieces: Sequence[Piece], thinning: Thinning | None = None
    ) -> DeviceLogits:
        """Appends embeddings, [N, D] in all → logits of the last position."""
        embeddings, before = self._embedder(pieces), cache.length
        end = before + embeddings.shape[0]
        require_context(before, end - before, self._context)
        self.reserve(cache, end)
        try:
            for part in self._parts(embeddings):
                share = self._lower_pass(cache, part)
            if thinning is None:
                upper = self._pool.take("upper rows", (end - before, self._width), self._dtype)
                self._stream.copy(rows(cache.rows, before, end), upper)
                positions = rows(self._all_positions["decoder_high"], before, end)
            else:
                upper, positions = self._thin(cache, share, thinning)
            for part in self._parts(upper):
                count = part.shape[0]
                self._upper_pass(cache.high, part, rows(positions, 0, count))
                positions = rows(positions, count, positions.shape[0])
        except BaseException:
            cache.rewind(before)
            raise
        return self._logits

    def decode(self, cache: DeviceThinnedCache, token: int) -> DeviceLogits:
        """Appends one token → logits of its position."""
        return self.extend(cache, [TokenIds(np.array([token], np.int64))])

    def decode_together(self, steps: Sequence[tuple[DeviceThinnedCache, int]]) -> list[DeviceLogits]:
        """Appends one token to a sequence → its logits."""
        return [self.decode(cache, token) for cache, token in steps]

    def fork(self, cache: DeviceThinnedCache, length: int, capacity: int) -> DeviceThinnedCache:
        """Another sequence that begins with the first ``length`` positions of a sequence, of which the upper layers
        have nothing yet."""
        found = self.new_cache(max(length, capacity), cache.low.rotary)
        found.low.copy(cache.low, length)
        self._stream.copy(rows(cache.rows, 0, length), rows(found.rows, 0, length))
        return found

    def _parts(self, whole: DeviceArray) -> list[DeviceArray]:
        """What each pass takes."""
        most, count = aligned_below(self._graphs.tokens_at_once, rows(whole, 0, 1).nbytes), whole.shape[0]
        return [rows(whole, begin, min(begin + most, count)) for begin in range(0, count, most)]

    def _lower_pass(self, cache: DeviceThinnedCache, embeddings: DeviceArray) -> DeviceArray:
        """Fills the rows of these positions; returns what the last of them gives each position so far, [N] fp32."""
        low, tokens = cache.low, embeddings.shape[0]
        begin, end = low.length, low.length + tokens
        in_place = self._graphs.in_place  # then the share is of the whole cache, in the order of its positions
        held = low.capacity if begin and not in_place else 0
        share = self._pool.take("share", (low.capacity if in_place else held + tokens,), np.float32)
        new_rows = self._pool.take("lower rows", (tokens, self._width), self._dtype)
        tensors = {"embeddings": embeddings, "positions": self._positions("decoder_low", begin, end)}
        self._run("decoder_low", low, tokens, {**tensors, "rows": new_rows, "share": share})
        self._stream.copy(new_rows, rows(cache.rows, begin, end))
        if in_place:
            return rows(share, 0, end)
        whole = self._pool.take("whole share", (end,), np.float32)
        self._stream.copy(rows(share, 0, begin), rows(whole, 0, begin))
        self._stream.copy(rows(share, held, held + tokens), rows(whole, begin, end))
        return whole

    def _thin(
        self, cache: DeviceThinnedCache, share: DeviceArray, thinning: Thinning
    ) -> tuple[DeviceArray, DeviceArray]:
        """The rows of a prompt that the upper layers see, and their positions."""
        prompt = cache.length
        thinner = self._thinner(thinning, prompt, self._width, self._dtype)
        thinned = self._pool.take("upper rows", (thinner.rows, self._width), self._dtype)
        stay = self._pool.take("stay", (thinner.rows,), np.int32)
        workspace = self._pool.take("thinning", (thinner.workspace_bytes,), np.uint8)
        whole, stream = rows(cache.rows, 0, prompt), self._stream
        thinner.enqueue(whole, share, thinned=thinned, stay=stay, workspace=workspace, stream=stream.handle)
        cache.restart(prompt, prompt - thinner.rows)
        every = self._all_positions["decoder_high"]
        positions = self._pool.take("upper positions", stay.shape, every.dtype)
        columns = [DeviceArray(x.address, (x.shape[0], 1), x.dtype) for x in (every, rows(every, 0, 1), positions)]
        enqueue_gather(columns[0], columns[1], stay, columns[2], stream)
        return thinned, positions

    def _upper_pass(self, high: KVCache, upper: DeviceArray, positions: DeviceArray) -> None:
        begin, end = high.length, high.length + upper.shape[0]
        rotary = self._pool.take("rotary", positions.shape, positions.dtype)
        self._stream.copy(positions, rotary)  # to where a tensor may begin
        tensors = {"rows": upper, "positions": self._positions("decoder_high", begin, end), "rotary": rotary}
        self._run("decoder_high", high, end - begin, {**tensors, "logits": self._logits.memory})

    def _run(self, graph: GraphName, cache: KVCache, tokens: int, tensors: dict[str, DeviceArray]) -> None:
        """One pass of a graph, whose rows of the cache it counts."""
        new = cache.room(tokens, self._pool)
        self._graphs.bind(graph, {**tensors, **cache.held(cache.length), **new})()
        cache.fill(new, tokens)

    def _positions(self, graph: GraphName, begin: int, end: int) -> DeviceArray:
        """Places in a cache, where a tensor may begin; the last alone, where the graph puts new rows there itself."""
        every, begin = self._all_positions[graph], end - 1 if self._graphs.in_place else begin
        places = self._pool.take("positions", (end - begin,), every.dtype)
        self._stream.copy(rows(every, begin, end), places)
        return places

    def _positions_of(self, graph: GraphName) -> DeviceArray:
        dtype = self._graphs.dtype(graph, "positions")
        every = self._pool.take(f"all positions of {graph}", (self._context,), dtype)
        self._stream.upload(np.arange(self._context), every)
        return every

    def _kv_cache(self, graph: GraphName, capacity: int) -> KVCache:
        spec = self._specs[graph]
        in_place, stream = self._graphs.in_place, self._stream
        tensors = cache_inputs(spec), cache_rows(spec)
        return KVCache(*tensors, capacity, in_place=in_place, stream=stream, released=lambda cache: None)

    def _take_back(self, cache: ThinnedCache) -> None:
        self._free = cast(DeviceThinnedCache, cache)
