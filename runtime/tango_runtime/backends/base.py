"""What the pipeline asks of a backend: one protocol, whatever runs the graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tango_plugins import PruneParams, TangoError
from tango_plugins.device_array import DeviceArray
from tango_plugins.thinning import Thinning
from tango_runtime.backends.rotary import TEXT, RotaryIds
from tango_runtime.util.console import OnProgress
from tango_runtime.video.batch import FrameBatch
from tango_runtime.video.source import TimedFrame

#: A tensor where the backend keeps it: a NumPy array on a CPU, a device array on a GPU. The pipeline only passes it on.
Tensor = Any


class LogitsOnDevice(Protocol):
    """Logits [V] on a device; NumPy copies them to the host."""

    shape: tuple[int, ...]

    def argmax(self) -> tuple[int, float]:
        """Index and value of the largest, as NumPy's argmax chooses it: a NaN if there is one, then the lower id."""

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> NDArray[Any]: ...


#: Logits of one position [V], fp32, where the backend keeps them.
Logits = NDArray[np.float32] | LogitsOnDevice


@dataclass(frozen=True)
class Trace:
    """The result of pruning that a report shows, on the host.

    Attributes:
        indices: [K] int32, flat f·L + l, ascending.
        merged: [K] bool, True for a merged context token, False for a salient one.
        segments: [S, 2] int32, first frame and one past the last.
    """

    indices: NDArray[np.int32]
    merged: NDArray[np.bool_]
    segments: NDArray[np.int32]


@dataclass(frozen=True)
class PrunedTokens:
    """The tokens that pruning kept.

    Attributes:
        tokens: [K, D], where the backend keeps it.
        indices: [K] int32, flat f·L + l, ascending; where the backend keeps it, or on the host.
        count: K.
        trace: Reads the rest, which no answer waits for; valid until the next video is pruned.
    """

    tokens: Tensor
    indices: Tensor
    count: int
    trace: Callable[[], Trace]


class TimingEvent(Protocol):
    """A moment in a backend's work."""

    def elapsed_ms(self, earlier: Any) -> float:
        """Milliseconds from an earlier event of the same backend to this one; waits until it is reached."""


class HostEvent:
    """The present by the host's clock, for backends that return when their work is done."""

    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_ms(self, earlier: HostEvent) -> float:
        """Milliseconds from an earlier event to this one."""
        return 1e3 * (self._seconds - earlier._seconds)


class KVCache(Protocol):
    """Keys and values of one sequence of tokens, where the backend keeps them; it grows as the sequence does.

    Attributes:
        length: Positions that are filled.
        rotary: The sequence's rotary positions, if the decoder has its own.
    """

    length: int
    rotary: RotaryIds

    def release(self) -> None:
        """Returns the memory to the backend, which may use it for the next cache."""


class FeatureRing(Protocol):
    """The vision graph's results for the newest steps of frames, in memory that does not grow.

    Attributes:
        held: Number of steps that it holds.
    """

    held: int

    def append(self, features: Tensor, salience: Tensor) -> None:
        """Adds steps, features [T, L, D] and salience [T, L]. If there is no room, they replace the oldest.

        All steps have the same L and D until :meth:`clear`.
        """

    def newest(self, steps: int) -> tuple[Tensor, Tensor]:
        """The newest ``steps`` steps, oldest first: features [T, L, D] and salience [T, L].

        They last until the next call of this or of :meth:`append`, of any ring of the backend.
        """

    def clear(self) -> None:
        """Forgets all steps; the next ones may have another L."""


class Backend(Protocol):
    """Runs the graphs of one bundle, for one thread at a time.

    A tensor lasts until the stage that made it is called again, logits until the next pass of any sequence. On a
    device a stage may return before its work is done: the events before and after it measure the work.

    Attributes:
        description: The backend, in one line.
        fallback_reason: Why ``auto`` took no faster backend; empty if it took the fastest, or if a backend was named.
        frame_size: (height, width) of the frames that its graphs were built for; None if they take any that the bundle
            allows.
        sequences: Sequences of one decode step, at most: 1 until :meth:`batch` allows more.
    """

    description: str
    fallback_reason: str
    frame_size: tuple[int, int] | None
    sequences: int

    def batch(self, sequences: int) -> None:
        """Lets decode steps have up to ``sequences`` sequences, or as many as this backend can.

        Then a sequence's logits do not depend on the others in its steps, nor on how many there are. They may differ by
        rounding from those of a backend that was not asked for more than one.

        Raises:
            TangoError: The device has not enough memory.
        """

    def load_frames(self, timed: Iterable[TimedFrame], count: int, size: tuple[int, int]) -> FrameBatch:
        """Reads ``count`` frames of any size → frames of a size (H, W), where :meth:`vision` reads them the fastest.

        Raises:
            TangoError: A frame cannot be read, or is not uint8 RGB [H, W, 3] in memory that the backend reads.
        """

    def vision(self, frames: NDArray[np.uint8] | DeviceArray, on_progress: OnProgress) -> tuple[Tensor, Tensor]:
        """Steps of frames [F, ...], as the vision graph takes them → features [F, L, D] and salience [F, L].

        ``on_progress`` gets the number of steps done. A backend on a device takes frames that are there already, too,
        if they are in its memory. It reports 0 when the frames are on their way there, before anything is computed,
        and may report steps that it still computes.
        """

    def new_ring(self, steps: int) -> FeatureRing:
        """An empty ring for ``steps`` steps of frames, where :meth:`prune` reads them."""

    def prune(
        self, features: Tensor, salience: Tensor, seconds: NDArray[np.float32], params: PruneParams
    ) -> PrunedTokens:
        """Features, salience and frame times in seconds → the tokens that are kept."""

    def flatten(self, features: Tensor) -> Tensor:
        """All tokens of all frames, [F·L, D]: what the decoder takes when nothing is pruned."""

    def with_row_ends(self, kept: PrunedTokens, columns: int, end: int) -> tuple[Tensor, int]:
        """Kept tokens with a row end after each grid row that keeps one.

        Args:
            kept: The tokens.
            columns: Width of a frame's grid.
            end: The row end: a row of the embedding graph.

        Returns:
            ([K + R, D], K + R).
        """

    def embed(self, ids: NDArray[np.int64]) -> Tensor:
        """[N] → embeddings [N, D]."""

    def new_cache(self, capacity: int, rotary: RotaryIds = TEXT) -> KVCache:
        """An empty sequence.

        Args:
            capacity: Positions that it will probably need: up to there it does not have to grow.
            rotary: Its rotary positions, if the decoder has its own.
        """

    def reserve(self, cache: KVCache, positions: int) -> None:
        """Makes room for ``positions`` positions in all.

        Raises:
            TangoError: There is no memory for them, or the backend's caches are smaller.
        """

    def extend(self, cache: KVCache, pieces: Sequence[Tensor], thinning: Thinning | None = None) -> Logits:
        """Appends embeddings, [N, D] in all and at least one → logits of the last position [vocabulary].

        Args:
            cache: The sequence.
            pieces: The embeddings to append.
            thinning: For a decoder with inner pruning, at the end of a prompt: the upper layers see only some of the
                video's rows, so what they held of the sequence is dropped and computed again. None for other bundles.

        Raises:
            TangoError: The sequence would be longer than the bundle's context, or there is no memory for it. The
                sequence is as long as before.
        """

    def decode(self, cache: KVCache, token: int) -> Logits:
        """Appends one token → logits of its position [vocabulary]; raises what :meth:`extend` does."""

    def decode_together(self, steps: Sequence[tuple[KVCache, int]]) -> Sequence[Logits]:
        """Appends one token to each of some sequences, at most ``sequences`` → logits of each, until its next pass.

        Raises:
            TangoError: As :meth:`extend`. All sequences are as long as before.
        """

    def fork(self, cache: KVCache, length: int, capacity: int) -> KVCache:
        """Another sequence that begins with the first ``length`` positions of a sequence.

        Args:
            cache: The sequence.
            length: Positions that both have.
            capacity: As of :meth:`new_cache`.

        Raises:
            TangoError: There is no memory for it.
        """

    def rewind(self, cache: KVCache, length: int) -> None:
        """Forgets everything after the first ``length`` positions, so that other tokens may follow them.

        After less than a thinned prompt, only what ends another prompt may follow.
        """

    def to_host(self, tensor: Tensor) -> NDArray[Any]:
        """A copy of a tensor on the host."""

    def record_event(self) -> TimingEvent:
        """The moment when all work given to the backend so far is done."""


def require_context(length: int, tokens: int, context: int) -> None:
    """Rejects tokens that would make a sequence longer than the bundle's context.

    Raises:
        TangoError: They would.
    """
    if length + tokens > context:
        raise TangoError(
            f"{length} + {tokens} tokens do not fit into the bundle's context of {context} positions",
            "keep fewer tokens (retention ratio, frames), ask less, or export with a larger --context",
        )
