"""The stages on a GPU, whichever engine runs the graphs: features, kept tokens, embeddings and cache stay there.

Up go the frames, their times and token ids; down come the number of kept tokens (unless the budget is exact) and, for
each token, eight bytes (greedy) or its logits. What a report tells of the pruning is read only when it is asked for.

Pruning is the CUDA library, called directly on the same stream. The bundle's prune.onnx as an engine gives the same
bits, but neither which tokens were merged nor the segments, and only at the ratio that it was built for: it is there
for programs without Python.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, TangoError, native_library, op
from tango_plugins.device_array import DeviceArray
from tango_plugins.pruner import CudaPruner, Dtype
from tango_runtime.backends.base import PrunedTokens, Trace
from tango_runtime.backends.cuda.device import ALIGNMENT, Event, HostPool, Pool, Stream, TransferStats, bytes_of, rows
from tango_runtime.backends.cuda.kv_cache import Cache, InPlaceCache
from tango_runtime.backends.cuda.logits import DeviceLogits
from tango_runtime.bundle import Bundle, GraphName
from tango_runtime.util.console import OnProgress

#: Where an engine does not fix the cache's capacity, it is a multiple of this many positions.
_POSITIONS = 256

#: Bytes of page-locked memory for token ids or times: enough for 8,192 of them.
_SMALL = 1 << 16

Run = Callable[[], None]

#: Puts one token of the sequence on the stream, given its id and its position: fills the logits and the cache's row.
Step = Callable[[int, int], None]


class GraphRunner(Protocol):
    """What runs the bundle's graphs on tensors in device memory."""

    @property
    def description(self) -> str:
        """The engine, in one line."""

    @property
    def frames_at_once(self) -> int | None:
        """Most frames of one pass; None for all."""

    @property
    def tokens_at_once(self) -> int:
        """Most tokens of one pass of the decoder or the embedding."""

    @property
    def capacity(self) -> int | None:
        """Positions of the decoder's cache, where the engine fixes them."""

    @property
    def in_place(self) -> bool:
        """Whether the decoder itself puts new rows into the cache."""

    def dtype(self, graph: GraphName, tensor: str) -> str:
        """What the engine takes for a tensor, by NumPy's name: TensorRT 8 has int32 where the graph has int64."""

    def bind(self, graph: GraphName, tensors: Mapping[str, DeviceArray], *, replay: bool = False) -> Run:
        """Prepares a graph to read and write these tensors.

        Args:
            graph: Which.
            tensors: Its inputs and outputs.
            replay: The same tensors will be run many times. One such binding of a graph is in use at a time, and its
                inputs must make sense already: it may be run while it is made.

        Returns:
            A function that puts one run on the stream. Without ``replay`` it lasts until the graph is bound again.

        Raises:
            TangoError: The engine was not built for these shapes. The function raises it too, where a run fails.
        """

    def step(self, cache: Sequence[DeviceArray], logits: DeviceArray, pool: Pool) -> Step | None:
        """A step of decoding that is more than a pass of the graphs over one token; None where there is none.

        Args:
            cache: Keys and values of each layer in turn, [heads, capacity, width of a head] each, all of them.
            logits: fp32 [vocabulary], to be filled.
            pool: Gives what memory it needs.

        Raises:
            TangoError: There is one, but not for this bundle or machine.
        """


@dataclass(frozen=True)
class TokenIds:
    """Token ids [N] that will be embedded where they are put: the text needs no memory of its own."""

    ids: NDArray[np.int64]


class _Embedding:
    """The embedding graph, bound anew only where the tensors are not those of the last run: of a step they are."""

    def __init__(self, graphs: GraphRunner) -> None:
        self._graphs = graphs
        self._bound: tuple[dict[str, DeviceArray], Run] | None = None

    def run(self, ids: DeviceArray, embeddings: DeviceArray) -> None:
        tensors = {"ids": ids, "embeddings": embeddings}
        if self._bound is None or self._bound[0] != tensors:
            self._bound = tensors, self._graphs.bind("embed", tensors)
        self._bound[1]()


class CudaBackend:
    """A bundle's graphs on a GPU.

    Args:
        bundle: The bundle.
        graphs: What runs its graphs.
        stream: The stream that they run on.

    Attributes:
        description: The engine, in one line.
        fallback_reason: Why this engine was taken, empty where it was asked for by name.

    Raises:
        TangoError: The device has not enough memory.
    """

    def __init__(self, bundle: Bundle, graphs: GraphRunner, stream: Stream) -> None:
        self.description, self.fallback_reason = graphs.description, ""
        self._graphs, self._stream, self._pool = graphs, stream, Pool()
        self._frames_pool, self._small_pool = HostPool(), HostPool(_SMALL)
        specs = bundle.manifest.graphs
        self._decoder, self._features = specs["decoder"], specs["vision"].outputs[0]
        self._width, self._dtype = bundle.manifest.decoder.hidden_size, bundle.manifest.dtype
        self._ids = graphs.dtype("embed", "ids")
        self._logits = self._new_logits()
        self._positions = self._pool.take(
            "all positions", (bundle.manifest.decoder.context,), graphs.dtype("decoder", "positions")
        )
        stream.upload(np.arange(self._positions.shape[0]), self._positions)
        self._pruner = functools.cache(CudaPruner)
        self._cache: Cache | None = None
        self._step: Step | None = None
        self._embedding = _Embedding(graphs)
        self._length = self._reached = 0  # positions: of the sequence, and of all since the cache was cleared
        if graphs.capacity is not None:  # its memory, and what TensorRT records, now: nobody waits for an answer yet
            self._cache = self._new_cache(graphs.capacity)
            self._step = self._new_step(self._cache)

    @property
    def traffic(self) -> TransferStats:
        """What has crossed between host and device so far."""
        return self._stream.traffic

    def frame_buffer(self, count: int, size: int) -> NDArray[np.uint8]:
        """An array [F, size, size, 3] to be filled, in memory that the GPU reads by itself."""
        return self._frames_pool.take((count, size, size, 3), np.uint8)

    def vision(self, frames: NDArray[np.uint8], on_progress: OnProgress) -> tuple[DeviceArray, DeviceArray]:
        """[F, size, size, 3] → features [F, L, D] and salience [F, L]; ``on_progress`` gets the frames done."""
        F, (L, D) = len(frames), self._features.shape[1:]
        video = self._pool.take("frames", frames.shape, np.uint8)
        features = self._pool.take("features", (F, int(L), int(D)), self._features.dtype)
        salience = self._pool.take("salience", (F, int(L)), np.float32)
        self._stream.upload(frames, video)
        on_progress(0)
        most = self._graphs.frames_at_once or F
        for begin in range(0, F, most):
            end = min(begin + most, F)
            named = {"frames": video, "features": features, "salience": salience}
            self._graphs.bind("vision", {name: rows(tensor, begin, end) for name, tensor in named.items()})()
            on_progress(end - begin)
        return features, salience

    def prune(
        self, features: DeviceArray, salience: DeviceArray, seconds: NDArray[np.float32], params: PruneParams
    ) -> PrunedTokens:
        """Features, salience and frame times in seconds → the tokens that are kept."""
        F, L, D = features.shape
        pruner = self._pruner(params, F, D, cast(Dtype, features.dtype))
        K, take = pruner.capacity, self._pool.take
        times = take("seconds", (F,), np.float32)
        self._upload(seconds, times)
        found: dict[str, Any] = {
            "tokens": take("tokens", (K, D), features.dtype),
            "indices": take("indices", (K,), np.int32),
            "count": take("count", (1,), np.int32),
            "merged": take("merged", (K,), np.uint8),
            "segments": take("segments", (F, 2), np.int32),
        }
        workspace = take("workspace", (pruner.workspace_bytes,), np.uint8)
        pruner.enqueue(features, salience, times, **found, workspace=workspace, stream=self._stream.handle)
        if params.budget == "exact":  # nothing waits: the prefill is on its way while the tower still computes
            count = op.exact_count(F, L, params)
        else:
            count = int(self._stream.download(found["count"])[0])
        return PrunedTokens(rows(found["tokens"], 0, count), count, lambda: self._trace(found, count))

    def flatten(self, features: DeviceArray) -> DeviceArray:
        """[F, L, D] → [F·L, D]."""
        F, L, D = features.shape
        return replace(features, shape=(F * L, D))

    def embed(self, ids: NDArray[np.int64]) -> TokenIds:
        """[N] → embeddings [N, D], made when they are used."""
        return TokenIds(ids)

    def prefill(self, pieces: list[Any], capacity: int) -> DeviceLogits:
        """Starts a sequence of embeddings, with room for ``capacity`` positions → logits of the last."""
        self._cache = self._cache_for(capacity)
        self._cache.clear(self._reached)
        self._length = self._reached = 0
        return self._extend(pieces)

    def extend(self, embeddings: Any) -> DeviceLogits:
        """Appends embeddings [N, D], at least one → logits of the last."""
        return self._extend([embeddings])

    def rewind(self, length: int) -> None:
        """Forgets everything behind the first ``length`` positions: what the cache holds there no longer counts."""
        self._length = length

    def decode(self, token: int) -> DeviceLogits:
        """Appends one token → logits of the next."""
        cache = self._require_room(1)
        if self._step is None:
            self._step = self._new_step(cache)
        self._reached = max(self._reached, self._length + 1)
        self._step(token, self._length)
        self._length += 1
        return self._logits

    def to_host(self, tensor: Any) -> NDArray[Any]:
        """A copy of a tensor on the host."""
        if isinstance(tensor, DeviceArray):
            return self._stream.download(tensor)
        if isinstance(tensor, TokenIds):
            return self._stream.download(self._embedded([tensor]))
        return np.asarray(tensor)

    def record_event(self) -> Event:
        """The moment when all work that was given to the stream so far is done."""
        return Event(self._stream)

    def _extend(self, pieces: list[Any]) -> DeviceLogits:
        embeddings = self._embedded(pieces)
        total = embeddings.shape[0]
        self._require_room(total)
        most = _aligned_below(self._graphs.tokens_at_once, bytes_of(rows(embeddings, 0, 1)))
        for begin in range(0, total, most):
            self._append(rows(embeddings, begin, min(begin + most, total)))
        return self._logits

    def _append(self, embeddings: DeviceArray) -> None:
        """One pass of the decoder."""
        tokens = embeddings.shape[0]
        cache = self._require_room(tokens)
        self._reached = max(self._reached, self._length + tokens)  # of a pass that fails, too, some may be written
        positions = self._pool.take("positions", (tokens,), self._positions.dtype)
        self._stream.copy(rows(self._positions, self._length, self._length + tokens), positions)
        new = cache.room(tokens)
        self._graphs.bind("decoder", self._decoder_tensors(cache, embeddings, positions, new, self._length))()
        cache.append(new, self._length)
        self._length += tokens

    def _new_step(self, cache: Cache) -> Step:
        own = self._graphs.step(list(cache.held(cache.capacity).values()), self._logits.memory, self._pool)
        return own or self._pass_of_one(cache)

    def _pass_of_one(self, cache: Cache) -> Step:
        """A step by the graphs, with tensors that stay where they are from token to token."""
        take, stream, positions, embed = self._pool.take, self._stream, self._positions, self._embedding.run
        ids, position = take("step ids", (1,), self._ids), take("step position", (1,), positions.dtype)
        embedding, new = take("step embedding", (1, self._width), self._dtype), cache.room(1, "step rows")
        tensors = self._decoder_tensors(cache, embedding, position, new, cache.capacity)
        run = self._graphs.bind("decoder", tensors, replay=True)

        def step(token: int, length: int) -> None:
            stream.upload(np.array([token]), ids)
            stream.copy(rows(positions, length, length + 1), position)
            embed(ids, embedding)
            run()
            cache.append(new, length)

        return step

    def _decoder_tensors(
        self, cache: Cache, embeddings: DeviceArray, positions: DeviceArray, new: dict[str, DeviceArray], length: int
    ) -> dict[str, DeviceArray]:
        return {
            "embeddings": embeddings,
            "positions": positions,
            **cache.held(length),
            "logits": self._logits.memory,
            **new,
        }

    def _embedded(self, pieces: list[Any]) -> DeviceArray:
        """Pieces of a sequence, wherever they are, one behind the other on the device."""
        lengths = [len(piece.ids) if isinstance(piece, TokenIds) else piece.shape[0] for piece in pieces]
        whole = self._pool.take("embeddings", (sum(lengths), self._width), self._dtype)
        begin = 0
        for piece, length in zip(pieces, lengths, strict=True):
            self._put(piece, rows(whole, begin, begin + length))
            begin += length
        return whole

    def _put(self, piece: Any, to: DeviceArray) -> None:
        if isinstance(piece, DeviceArray):
            self._stream.copy(piece, to)
        elif isinstance(piece, TokenIds):
            self._put_words(piece.ids, to)
        else:  # embeddings on the host, as an evaluation's other methods make them
            self._stream.upload(piece, to)

    def _put_words(self, ids: NDArray[np.int64], to: DeviceArray) -> None:
        most = self._graphs.tokens_at_once
        for begin in range(0, len(ids), most):
            part = ids[begin : begin + most]
            on_device = self._pool.take("ids", part.shape, self._ids)
            embeddings = self._pool.take("words", (len(part), self._width), self._dtype)
            self._upload(part, on_device)
            self._embedding.run(on_device, embeddings)
            self._stream.copy(embeddings, rows(to, begin, begin + len(part)))

    def _upload(self, array: NDArray[Any], to: DeviceArray) -> None:
        """Copies a small array to the device by way of page-locked memory: from other memory, a copy may wait."""
        staged = self._small_pool.take(to.shape, to.dtype)
        staged[:] = array
        self._stream.upload(staged, to)

    def _cache_for(self, capacity: int) -> Cache:
        """The cache that has room for so many positions."""
        fixed = self._graphs.capacity
        if fixed is not None and capacity > fixed:
            raise TangoError(
                f"prompt and answer may take {capacity} positions, the decoder's engine holds {fixed}",
                "ask for fewer (--max-new-tokens, --retention-ratio), or build it larger: tango build BUNDLE --context",
            )
        wanted = fixed or -(-capacity // _POSITIONS) * _POSITIONS
        if self._cache is not None and self._cache.capacity == wanted:
            return self._cache
        self._cache = self._step = None  # its memory goes first, and stays away if the new one has no room
        return self._new_cache(wanted)

    def _new_cache(self, capacity: int) -> Cache:
        cached, new = self._decoder.inputs[2:], self._decoder.outputs[1:]
        kind = InPlaceCache if self._graphs.in_place else Cache
        cache = kind(cached, new, capacity, self._pool, self._stream)
        cache.clear(capacity)  # its memory may have been another's
        self._reached = 0
        return cache

    def _new_logits(self) -> DeviceLogits:
        (vocabulary,) = self._decoder.outputs[0].shape
        logits = self._pool.take("logits", (int(vocabulary),), np.float32)
        return DeviceLogits(logits, self._pool.take("greatest", (8,), np.uint8), self._stream)

    def _require_room(self, tokens: int) -> Cache:
        """The cache, once so many more tokens fit into it."""
        capacity = min(self._cache.capacity, self._positions.shape[0]) if self._cache else 0
        if self._cache is None or self._length + tokens > capacity:
            raise TangoError(
                f"{self._length} + {tokens} tokens do not fit into a cache of {capacity} positions",
                "begin with a prefill that makes room for all of them",
            )
        return self._cache

    def _trace(self, found: dict[str, DeviceArray], count: int) -> Trace:
        host = {name: self._stream.download(found[name]) for name in ("indices", "merged", "segments")}
        segments = host["segments"]
        return Trace(host["indices"][:count], host["merged"][:count].astype(bool), segments[segments[:, 0] >= 0])


def open_stream() -> Stream:
    """A stream, once it is certain that there are a GPU and the CUDA library, which all stages need.

    Raises:
        TangoError: One of them is missing.
    """
    stream = Stream()
    native_library.load()
    return stream


def _aligned_below(most: int, row: int) -> int:
    """The greatest number of rows of so many bytes, up to ``most``, behind which a tensor may begin."""
    step = ALIGNMENT // math.gcd(ALIGNMENT, row)
    return most // step * step or most
