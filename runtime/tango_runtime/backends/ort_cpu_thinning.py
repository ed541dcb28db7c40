"""The CPU backend for bundles with inner pruning, whose decoder is two graphs with a step between them.

The lower layers read a whole prompt before the upper ones begin: which rows stay depends on what its last row attends
to. So a session computes the lower layers of a video once, and the upper ones for each question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tango_plugins.thinning import Thinning, thin
from tango_runtime.backends.base import require_context
from tango_runtime.backends.ort_cpu import PASS, Array, HostKVCache, OrtCpuBackend, cache_inputs, open_graph, run_graph
from tango_runtime.backends.rotary import TEXT, RotaryIds
from tango_runtime.backends.thinned_cache import ThinnedCache
from tango_runtime.bundle import Bundle


class HostThinnedCache(ThinnedCache):
    """A sequence on the host.

    Attributes:
        rows: [capacity, D], what the lower layers gave for each position.
    """

    def __init__(self, low: HostKVCache, high: HostKVCache, rows: Array) -> None:
        super().__init__(low, high)
        self.rows = rows

    def reserve(self, positions: int) -> None:
        """Makes room for ``positions`` positions in all."""
        self.low.reserve(positions)
        self.high.reserve(positions)
        if self.low.capacity > len(self.rows):
            old, self.rows = self.rows, np.zeros((self.low.capacity, self.rows.shape[1]), self.rows.dtype)
            self.rows[: len(old)] = old


class ThinningOrtCpuBackend(OrtCpuBackend):
    """As :class:`OrtCpuBackend`, with a decoder of two graphs: the attributes of the base are the upper one's."""

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        super().__init__(bundle, threads=threads)
        self._lower = open_graph(bundle, "decoder_low", threads)
        spec = bundle.manifest.graphs["decoder_low"]
        self._lower_specs, self._hidden = cache_inputs(spec), spec.outputs[0]

    def new_cache(self, capacity: int, rotary: RotaryIds = TEXT) -> HostThinnedCache:  # type: ignore[override]
        """An empty sequence with room for ``capacity`` positions."""
        low, high = (HostKVCache(specs, capacity, rotary) for specs in (self._lower_specs, self._cache_specs))
        return HostThinnedCache(low, high, np.zeros((capacity, int(self._hidden.shape[1])), self._hidden.dtype))

    def extend(  # type: ignore[override]
        self, cache: HostThinnedCache, pieces: Sequence[Array], thinning: Thinning | None = None
    ) -> NDArray[np.float32]:
        """Appends embeddings, [N, D] in all → logits of the last position."""
        embeddings, before = np.concatenate(pieces), cache.length
        end = before + len(embeddings)
        require_context(before, len(embeddings), self._context)
        cache.reserve(end)
        try:
            for begin in range(0, len(embeddings), PASS):
                share = self._lower_pass(cache, embeddings[begin : begin + PASS])
            rows: Array = cache.rows[before:end]
            positions: Array = np.arange(before, end)
            if thinning is not None:
                rows, positions = thin(cache.rows[:end], share, thinning)
                cache.restart(end, end - len(rows))
            for begin in range(0, len(rows), PASS):
                logits = self._upper_pass(cache.high, rows[begin : begin + PASS], positions[begin : begin + PASS])
        except BaseException:
            cache.rewind(before)
            raise
        return logits

    def fork(self, cache: HostThinnedCache, length: int, capacity: int) -> HostThinnedCache:  # type: ignore[override]
        """Another sequence that begins with the first ``length`` positions of a sequence, of which the upper layers
        have nothing yet."""
        found = self.new_cache(max(length, capacity), cache.low.rotary)
        found.low.append([rows[:, :length] for rows in cache.low.rows.values()])
        found.rows[:length] = cache.rows[:length]
        return found

    def _lower_pass(self, cache: HostThinnedCache, embeddings: Array) -> Array:
        """What the last of the embeddings gives each position so far, [N]."""
        low = cache.low
        begin, end = low.length, low.length + len(embeddings)
        past = _held(low)
        feeds = {"embeddings": embeddings, "positions": np.arange(begin, end, dtype=np.int64)}
        cache.rows[begin:end], share, *new = run_graph(self._lower, {**feeds, **past})
        low.append(new)
        return np.concatenate((share[:begin], share[len(share) - len(embeddings) :]))

    def _upper_pass(self, high: HostKVCache, rows: Array, positions: Array) -> NDArray[np.float32]:
        slots = np.arange(high.length, high.length + len(rows), dtype=np.int64)
        feeds = {"rows": rows, "positions": slots, "rotary": positions.astype(np.int64)}
        logits, *new = run_graph(self._decoder, {**feeds, **_held(high)})
        high.append(new)
        found: NDArray[np.float32] = logits
        return found


def _held(cache: HostKVCache) -> dict[str, Array]:
    """The cache as a graph takes it; an empty one spares attention the rows that would not count."""
    return cache.rows if cache.length else {name: rows[:, :0] for name, rows in cache.rows.items()}
