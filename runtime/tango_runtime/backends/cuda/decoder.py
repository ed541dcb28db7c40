"""The decoder on a GPU: key/value caches, passes over many tokens, and decode steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from tango_plugins import TangoError
from tango_plugins.decoder import MAX_SEQUENCES
from tango_plugins.device_array import DeviceArray
from tango_plugins.thinning import Thinning
from tango_runtime.backends.base import require_context
from tango_runtime.backends.cuda.device import ALIGNMENT, Pool, Stream, rows
from tango_runtime.backends.cuda.embedder import Embedder, Piece
from tango_runtime.backends.cuda.kv_cache import KVCache
from tango_runtime.backends.cuda.logits import DeviceLogits, Greatest, KnownLogits, StepLogits
from tango_runtime.backends.cuda.runner import (
    BatchedStep,
    DeviceStep,
    GraphRunner,
    SequenceRow,
    Step,
    StepOutput,
    Token,
)
from tango_runtime.backends.ort_cpu import cache_inputs
from tango_runtime.backends.rotary import TEXT, RotaryIds
from tango_runtime.bundle import Manifest

_log = logging.getLogger(__name__)

#: Where the runner does not fix a cache's capacity, it is a multiple of this many positions.
_POSITIONS = 256


class SequenceDecoder(Protocol):
    """What the backend asks of a decoder; see :class:`tango_runtime.backends.base.Backend`."""

    sequences: int

    def batch(self, sequences: int) -> None:
        """Lets steps have up to ``sequences`` sequences, or as many as it can."""

    def new_cache(self, capacity: int, rotary: RotaryIds = TEXT) -> Any:
        """An empty sequence with room for ``capacity`` positions."""

    def reserve(self, cache: Any, positions: int) -> None:
        """Makes room for ``positions`` positions in all."""

    def extend(self, cache: Any, pieces: Sequence[Piece], thinning: Thinning | None) -> DeviceLogits:
        """Appends embeddings, [N, D] in all → logits of the last position."""

    def decode(self, cache: Any, token: int) -> DeviceLogits:
        """Appends one token → logits of its position."""

    def decode_together(self, steps: Sequence[tuple[Any, int]]) -> list[DeviceLogits]:
        """Appends one token to each of some sequences → logits of each."""

    def fork(self, cache: Any, length: int, capacity: int) -> Any:
        """Another sequence that begins with the first ``length`` positions of a sequence."""


@dataclass(frozen=True)
class _Ahead:
    """A decode step that the GPU computes before it is asked for.

    Attributes:
        state: That of the sequence it follows.
        token: The token it appends.
        index: Which logits it fills.
    """

    state: object
    token: int
    index: int


class Decoder:
    """Runs the decoder graph over sequences, each in a cache of its own.

    Greedy decoding of one sequence by the runner's own step runs one step ahead. As soon as a step's token is found,
    the next step begins, before the host looks at the token. If :meth:`decode` then asks for that step, it is under
    way; if not, it was for nothing: the next pass writes over its row of the cache. No step runs ahead after a stop
    token, or after the last token that there is room for.

    Args:
        manifest: The bundle's.
        graphs: Runs its graphs.
        embedder: Makes embeddings of the pieces of a sequence.
        stream: The stream that all of it runs on.
        pool: Gives memory for one pass.

    Raises:
        TangoError: The device has not enough memory.
    """

    def __init__(self, manifest: Manifest, graphs: GraphRunner, embedder: Embedder, stream: Stream, pool: Pool) -> None:
        self._graphs, self._embedder, self._stream, self._pool = graphs, embedder, stream, pool
        self._spec = manifest.graphs["decoder"]
        self._context, self._rotary = manifest.decoder.context, manifest.decoder.rotary is not None
        self._greatest = Greatest(stream)
        (vocabulary,) = self._spec.outputs[0].shape
        # Two: a step that runs ahead leaves the logits that it follows as they are.
        logits = [pool.take(name, (int(vocabulary),), np.float32) for name in ("logits", "logits ahead")]
        self._outputs = [StepOutput(row, self._greatest.address(i)) for i, row in enumerate(logits)]
        self._logits = DeviceLogits(logits[0], self._greatest, stream)
        self._words = embedder.words(manifest.prompt.stop)
        self._ahead: _Ahead | None = None
        self._positions = pool.take("all positions", (self._context,), graphs.dtype("decoder", "positions"))
        stream.upload(np.arange(self._context), self._positions)
        self._free: list[KVCache] = []  # their memory, and their steps, serve the next sequences
        # The runner replays one binding at a time: TensorRT 8 lets no two contexts share an optimization profile.
        self._replay: tuple[KVCache, Step] | None = None
        self.sequences = 1
        self._batched_step: BatchedStep | None = None
        if graphs.capacity is not None:  # allocate and record at load time, not within the first answer
            first = self.new_cache(graphs.capacity)
            if self._step_of(first) is None:
                self._replay_of(first, self._embedder.step([0])[0])
            first.release()

    def batch(self, sequences: int) -> None:
        """Lets steps have up to ``sequences`` sequences, as far as the CUDA library has such steps."""
        if sequences == 1 or self._batched_step is not None:
            return
        try:
            self._batched_step = self._graphs.batched_step(self._pool)
        except TangoError as error:
            _log.warning("sequences are decoded one after the other: %s", error.message)
        if self._batched_step is not None:
            self.sequences = min(sequences, MAX_SEQUENCES)

    def new_cache(self, capacity: int, rotary: RotaryIds = TEXT) -> KVCache:
        """An empty sequence with room for ``capacity`` positions, and its rotary positions.

        Raises:
            TangoError: The runner's caches are smaller, or the device has not enough memory.
        """
        fixed = self._graphs.capacity
        if fixed is not None and capacity > fixed:
            raise too_small(capacity, fixed)
        wanted = fixed or rounded(capacity)
        cache = self._released(wanted) or KVCache(
            cache_inputs(self._spec),
            self._spec.outputs[1:],
            wanted,
            in_place=self._graphs.in_place,
            stream=self._stream,
            released=self._take_back,
        )
        cache.rotary, cache.wanted = rotary, capacity
        return cache

    def reserve(self, cache: KVCache, positions: int) -> None:
        """Makes room for ``positions`` positions in all."""
        self._make_room(cache, positions)
        cache.wanted = positions

    def _make_room(self, cache: KVCache, positions: int) -> None:
        if positions <= cache.capacity:
            return
        if self._graphs.capacity is not None:
            raise too_small(positions, cache.capacity)
        self._forget(cache)
        cache.grow(rounded(positions))

    def extend(self, cache: KVCache, pieces: Sequence[Piece], thinning: Thinning | None = None) -> DeviceLogits:
        """Appends embeddings, [N, D] in all → logits of the last position."""
        assert thinning is None
        self._ahead = None  # its logits are about to be overwritten
        embeddings, before = self._embedder(pieces), cache.length
        tokens = embeddings.shape[0]
        require_context(before, tokens, self._context)
        self._make_room(cache, before + tokens)
        most = aligned_below(self._graphs.tokens_at_once, rows(embeddings, 0, 1).nbytes)
        try:
            for begin in range(0, tokens, most):
                self._pass(cache, rows(embeddings, begin, min(begin + most, tokens)))
        except BaseException:
            cache.rewind(before)
            raise
        return self._logits

    def fork(self, cache: KVCache, length: int, capacity: int) -> KVCache:
        """Another sequence that begins with the first ``length`` positions of a sequence."""
        found = self.new_cache(max(length, capacity), cache.rotary)
        found.copy(cache, length)
        return found

    def decode_together(self, steps: Sequence[tuple[KVCache, int]]) -> list[DeviceLogits]:
        """Appends one token to each of some sequences → logits of each; waits for them."""
        if self._batched_step is None:
            return [self.decode(cache, token) for cache, token in steps]
        for cache, _ in steps:
            require_context(cache.length, 1, self._context)
            self._make_room(cache, cache.length + 1)
        embeddings = self._embedder.step([token for _, token in steps])
        tokens = [
            Token(embedding, cache.length, cache.length + cache.rotary.offset, cache.capacity, self._row_of(cache))
            for embedding, (cache, _) in zip(embeddings, steps, strict=True)
        ]
        self._batched_step(tokens)
        logits = [token.row.logits for token in tokens]
        found = self._greatest.find(logits)
        for cache, _ in steps:
            cache.advance(1)
        return [KnownLogits(row, self._greatest, self._stream, known) for row, known in zip(logits, found, strict=True)]

    def decode(self, cache: KVCache, token: int) -> DeviceLogits:
        """Appends one token → logits of its position."""
        if self._batched_step is not None:  # the same results, whether or not there are others in the step
            return self.decode_together([(cache, token)])[0]
        require_context(cache.length, 1, self._context)
        self._make_room(cache, cache.length + 1)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (ahead.state, ahead.token) == (cache.state, token):
            index = ahead.index
        else:
            index = 0
            self._run_step(cache, token)
        cache.advance(1)
        if cache.step is None:
            return self._logits
        run_ahead = partial(self._run_ahead, cache, cache.step, cache.state, index)
        return StepLogits(self._outputs[index].logits, self._greatest, self._stream, index, run_ahead)

    def _run_step(self, cache: KVCache, token: int) -> None:
        """Puts a token's step on the stream: it fills the first logits."""
        (embedding,) = self._embedder.step([token])
        places = cache.length, cache.length + cache.rotary.offset
        if (step := self._step_of(cache)) is not None:
            step(embedding, *places, self._outputs[0])
        else:
            self._replay_of(cache, embedding)(embedding, *places)

    def _run_ahead(self, cache: KVCache, step: DeviceStep, state: object, index: int) -> bool:
        """Waits for the token that follows a step's logits and begins its step; False if there will be no such step.

        Args:
            cache: The sequence.
            step: Its decode step.
            state: Its state after the step.
            index: Which logits are the step's; they are left as they are.
        """
        if cache.state is not state or cache.length + 1 >= cache.wanted:
            return False
        cache.reach(1)
        places = cache.length, cache.length + cache.rotary.offset
        other = 1 - index
        token = step.after(self._words, self._outputs[index].best, *places, self._outputs[other])
        self._stream.waited()
        if token is not None:
            self._stream.count_upload(self._words.row.nbytes)
            self._ahead = _Ahead(state, token, other)
        return True

    def _pass(self, cache: KVCache, embeddings: DeviceArray) -> None:
        """One pass of the decoder."""
        tokens, length = embeddings.shape[0], cache.length
        taken = 1 if self._graphs.in_place else tokens
        positions = self._pool.take("positions", (taken,), self._positions.dtype)
        self._stream.copy(rows(self._positions, length + tokens - taken, length + tokens), positions)
        inputs = {"embeddings": embeddings, "positions": positions}
        if self._rotary:
            inputs["rotary"] = self._pool.take("rotary", (3, tokens), positions.dtype)
            self._embedder.upload(cache.rotary.at(length, length + tokens), inputs["rotary"])
        new = cache.room(tokens, self._pool)
        self._graphs.bind("decoder", self._tensors(cache, inputs, new, length))()
        cache.fill(new, tokens)

    def _step_of(self, cache: KVCache) -> DeviceStep | None:
        """The runner's own decode step of a cache; None where a step is a pass of its graphs."""
        if cache.step is None:
            cache.step = self._graphs.step(list(cache.held(cache.capacity).values()), cache.pool)
        return cache.step

    def _replay_of(self, cache: KVCache, embedding: DeviceArray) -> Step:
        """A pass of the runner's graphs over one token that is replayed on this embedding."""
        if self._replay is None or self._replay[0] is not cache:
            self._replay = cache, self._pass_of_one(cache, embedding)
        return self._replay[1]

    def _row_of(self, cache: KVCache) -> SequenceRow:
        """What steps of several sequences need of one."""
        assert self._batched_step is not None
        if cache.row is None:
            cache.row = self._batched_step.new_row(list(cache.held(cache.capacity).values()), cache.pool)
        return cache.row

    def _pass_of_one(self, cache: KVCache, embedding: DeviceArray) -> Step:
        """A step by the graphs, with tensors that stay where they are from token to token."""
        take, stream, positions = self._pool.take, self._stream, self._positions
        position = take("step position", (1,), positions.dtype)
        inputs = {"embeddings": embedding, "positions": position}
        if self._rotary:
            inputs["rotary"] = take("step rotary", (3, 1), positions.dtype)
        new = cache.room(1, self._pool, "step rows")
        run = self._graphs.bind("decoder", self._tensors(cache, inputs, new, cache.capacity), replay=True)

        def step(_: DeviceArray, length: int, rotation: int) -> None:
            stream.copy(rows(positions, length, length + 1), position)
            if self._rotary:
                stream.upload(np.full((3, 1), rotation), inputs["rotary"])
            run()
            if not self._graphs.in_place:
                cache.append(new)

        return step

    def _tensors(
        self, cache: KVCache, inputs: dict[str, DeviceArray], new: dict[str, DeviceArray], length: int
    ) -> dict[str, DeviceArray]:
        return {**inputs, **cache.held(length), "logits": self._logits.memory, **new}

    def _released(self, capacity: int) -> KVCache | None:
        """A cache that was given back, cleared, if it has that capacity; others are dropped."""
        while self._free:
            cache = self._free.pop()
            if cache.capacity == capacity:
                cache.rewind(0)
                return cache
            self._forget(cache)
        return None

    def _take_back(self, cache: KVCache) -> None:
        """Keeps a released cache for another sequence, and no more of them than are decoded together."""
        self._free.append(cache)
        while len(self._free) > self.sequences:
            self._forget(self._free.pop(0))

    def _forget(self, cache: KVCache) -> None:
        """Drops a recording of a cache whose memory goes."""
        if self._replay is not None and self._replay[0] is cache:
            self._replay = None


def too_small(positions: int, capacity: int) -> TangoError:
    """The error of a cache that an engine does not hold."""
    return TangoError(
        f"prompt and answer may take {positions} positions, the decoder's engine holds {capacity}",
        "ask for fewer (new tokens, retention ratio), or build it larger: tango build BUNDLE --context",
    )


def rounded(positions: int) -> int:
    """The capacity of a cache that holds ``positions`` positions."""
    return -(-positions // _POSITIONS) * _POSITIONS


def aligned_below(most: int, row: int) -> int:
    """The largest number of rows of ``row`` bytes, up to ``most``, after which a tensor may begin."""
    step = ALIGNMENT // math.gcd(ALIGNMENT, row)
    return most // step * step or most
