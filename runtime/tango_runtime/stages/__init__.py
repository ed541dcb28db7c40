"""The bundle's graphs, loaded in an engine: one protocol, whatever the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, TangoError
from tango_runtime.bundle import Bundle
from tango_runtime.progress import Advance

#: A tensor where the engine keeps it: a NumPy array on a CPU, a device buffer on a GPU. The chain only hands it on.
Tensor = Any


@dataclass(frozen=True)
class Kept:
    """What pruning left.

    Attributes:
        tokens: [K, D], where the engine keeps it.
        indices: [K] int32 on the host, flat f·L + l, ascending.
        merged: [K] bool on the host, True for a merged context token, False for a salient one.
        segments: [S, 2] int32 on the host, first frame and one past the last.
    """

    tokens: Tensor
    indices: NDArray[np.int32]
    merged: NDArray[np.bool_]
    segments: NDArray[np.int32]


class Stages(Protocol):
    """What the chain asks of an engine. The engine owns its buffers and the key/value cache."""

    description: str

    def vision(self, frames: NDArray[np.uint8], advance: Advance) -> tuple[Tensor, Tensor]:
        """[F, size, size, 3] → features [F, L, D] and salience [F, L]; ``advance`` is told the frames that are done."""

    def prune(self, features: Tensor, salience: Tensor, seconds: NDArray[np.float32], params: PruneParams) -> Kept:
        """Features, salience and frame times in seconds → the tokens that are kept."""

    def flatten(self, features: Tensor) -> Tensor:
        """All tokens of all frames, [F·L, D]: what the decoder takes when nothing is pruned."""

    def embed(self, ids: NDArray[np.int64]) -> Tensor:
        """[N] → embeddings [N, D]."""

    def prefill(self, pieces: list[Tensor], capacity: int) -> NDArray[np.float32]:
        """Starts a sequence of embeddings, with room for ``capacity`` positions → logits of the last [vocabulary]."""

    def decode(self, token: int) -> NDArray[np.float32]:
        """Appends one token → logits of the next [vocabulary]."""

    def host(self, tensor: Tensor) -> NDArray[Any]:
        """A copy of a tensor on the host."""


#: Engines, the fastest first.
ENGINES = ("onnxruntime-cpu",)


def select(bundle: Bundle, engine: str = "auto") -> Stages:
    """Loads a bundle's graphs in an engine.

    Args:
        bundle: The bundle.
        engine: One of ``ENGINES``; ``auto`` takes the first that this machine has.

    Raises:
        TangoError: There is no such engine, or it cannot load the bundle.
    """
    if engine not in ("auto", *ENGINES):
        raise TangoError(f"there is no engine {engine!r}", f"known are auto, {', '.join(ENGINES)}")
    from tango_runtime.stages.onnxruntime import OnnxRuntimeStages

    return OnnxRuntimeStages(bundle)
