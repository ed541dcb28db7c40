"""The bundle's graphs, loaded in an engine: one protocol, whatever the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams
from tango_runtime.pipeline.sampling import Logits
from tango_runtime.util.console import OnProgress

#: A tensor where the engine keeps it: a NumPy array on a CPU, a device buffer on a GPU. The chain only hands it on.
Tensor = Any


@dataclass(frozen=True)
class Trace:
    """What a report tells of the pruning, on the host.

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
    """What pruning left.

    Attributes:
        tokens: [K, D], where the engine keeps it.
        count: K.
        trace: Reads the rest, which nothing waits for; until the next video is pruned.
    """

    tokens: Tensor
    count: int
    trace: Callable[[], Trace]


class TimingEvent(Protocol):
    """A moment in an engine's work."""

    def elapsed_ms(self, earlier: Any) -> float:
        """Milliseconds from an earlier mark of the same engine to this one; waits until it is reached."""


class HostEvent:
    """The present, by the host's clock: for engines that return when their work is done."""

    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_ms(self, earlier: HostEvent) -> float:
        """Milliseconds from an earlier mark to this one."""
        return 1e3 * (self._seconds - earlier._seconds)


class Backend(Protocol):
    """What the chain asks of an engine. The engine owns its buffers and the key/value cache.

    Tensors and logits last until the stage that made them is called again. On a device a stage may return before its
    work is done: what it took, marks before and behind it tell.

    Attributes:
        description: The engine, in one line.
        fallback_reason: Why ``auto`` took none before it, empty where it is the first or was asked for by name.
    """

    description: str
    fallback_reason: str

    def frame_buffer(self, count: int, size: int) -> NDArray[np.uint8]:
        """An array [F, size, size, 3] to be filled, from where :meth:`vision` takes frames the fastest."""

    def vision(self, frames: NDArray[np.uint8], on_progress: OnProgress) -> tuple[Tensor, Tensor]:
        """[F, size, size, 3] → features [F, L, D] and salience [F, L]; ``on_progress`` gets the number of frames done.

        An engine on a device tells 0 when the frames are on their way there, before anything is computed, and may tell
        of frames that it is still at work on.
        """

    def prune(
        self, features: Tensor, salience: Tensor, seconds: NDArray[np.float32], params: PruneParams
    ) -> PrunedTokens:
        """Features, salience and frame times in seconds → the tokens that are kept."""

    def flatten(self, features: Tensor) -> Tensor:
        """All tokens of all frames, [F·L, D]: what the decoder takes when nothing is pruned."""

    def embed(self, ids: NDArray[np.int64]) -> Tensor:
        """[N] → embeddings [N, D]."""

    def prefill(self, pieces: list[Tensor], capacity: int) -> Logits:
        """Starts a sequence of embeddings, with room for ``capacity`` positions → logits of the last [vocabulary]."""

    def extend(self, embeddings: Tensor) -> Logits:
        """Appends embeddings [N, D], at least one → logits of the last [vocabulary]."""

    def rewind(self, length: int) -> None:
        """Forgets everything behind the first ``length`` positions, so that another text may follow them."""

    def decode(self, token: int) -> Logits:
        """Appends one token → logits of the next [vocabulary]."""

    def to_host(self, tensor: Tensor) -> NDArray[Any]:
        """A copy of a tensor on the host."""

    def record_event(self) -> TimingEvent:
        """The moment when all work that was given to the engine so far is done."""
