"""The stages on ONNX Runtime's CPU engine; pruning is the NumPy reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, TangoError, reference
from tango_runtime.backends.base import HostEvent, PrunedTokens, Trace
from tango_runtime.backends.ort_options import session_options
from tango_runtime.bundle import Bundle, GraphName, TensorSpec
from tango_runtime.util.console import OnProgress

Array = NDArray[Any]

#: Tokens of one pass of the prefill. Scores take heads · pass · positions · 4 bytes: in one pass, 6300 tokens that were
#: not pruned would take 2.2 GB in each layer of the 0.5B model.
_PASS = 1024

_VERIFY = "check the bundle with: tango inspect BUNDLE --verify"


def open_session(graph: Path, *, threads: int = 0) -> Any:
    """Loads an ONNX graph on ONNX Runtime's CPU engine.

    Args:
        graph: The ONNX file.
        threads: Threads of one operator; 0 takes one for each core.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        TangoError: ONNX Runtime is not installed, or cannot load the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise TangoError("ONNX Runtime is not installed", "pip install 'tango-edge[cpu]'") from error
    options = session_options(threads=threads)
    with refusing(f"load {graph}", _VERIFY):
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


@contextmanager
def refusing(what: str, hint: str) -> Iterator[None]:
    """Turns ONNX Runtime's errors, which have no common class, into ours.

    Args:
        what: What it is asked to do, behind "cannot".
        hint: What to do where it cannot.

    Raises:
        TangoError: It cannot.
    """
    try:
        yield
    except Exception as error:
        raise TangoError(f"ONNX Runtime cannot {what}: {str(error).splitlines()[0]}", hint) from error


class OrtCpuBackend:
    """A bundle's graphs on ONNX Runtime's CPU engine.

    Args:
        bundle: The bundle.
        threads: Threads of one operator; 0 takes one for each core.

    Raises:
        TangoError: ONNX Runtime is not installed, or a graph cannot be loaded.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        self._vision, self._embed, self._decoder = (
            _open(bundle, name, threads) for name in ("vision", "embed", "decoder")
        )
        self._cache_specs = bundle.manifest.graphs["decoder"].inputs[2:]
        self._cache: dict[str, Array] = {}
        self._length = 0
        self.description, self.fallback_reason = f"ONNX Runtime {_version()}, CPU", ""

    def frame_buffer(self, count: int, size: int) -> NDArray[np.uint8]:
        """An array [F, size, size, 3] to be filled."""
        return np.empty((count, size, size, 3), np.uint8)

    def vision(self, frames: NDArray[np.uint8], on_progress: OnProgress) -> tuple[Array, Array]:
        """[F, size, size, 3] → features [F, L, D] and salience [F, L]; ``on_progress`` gets the frames done."""
        parts = []
        for i in range(len(frames)):
            # One frame at a time: on a CPU a batch is no faster, and its scores would take F times the memory.
            parts.append(_run(self._vision, {"frames": frames[i : i + 1]}))
            on_progress(1)
        features, salience = (np.concatenate(part) for part in zip(*parts, strict=True))
        return features, salience

    def prune(
        self, features: Array, salience: Array, seconds: NDArray[np.float32], params: PruneParams
    ) -> PrunedTokens:
        """Features, salience and frame times in seconds → the tokens that are kept."""
        pruned = reference.prune(features, salience, seconds, params)
        return PrunedTokens(pruned.tokens, pruned.count, lambda: Trace(pruned.indices, pruned.merged, pruned.segments))

    def flatten(self, features: Array) -> Array:
        """[F, L, D] → [F·L, D]."""
        return features.reshape(-1, features.shape[-1])

    def embed(self, ids: NDArray[np.int64]) -> Array:
        """[N] → embeddings [N, D]."""
        embeddings: Array = _run(self._embed, {"ids": ids})[0]
        return embeddings

    def prefill(self, pieces: list[Array], capacity: int) -> NDArray[np.float32]:
        """Starts a sequence of embeddings, with room for ``capacity`` positions → logits of the last."""
        self._cache = empty_cache(self._cache_specs, capacity)
        self._length = 0
        return self.extend(np.concatenate(pieces))

    def extend(self, embeddings: Array) -> NDArray[np.float32]:
        """Appends embeddings [N, D], at least one → logits of the last."""
        for begin in range(0, len(embeddings), _PASS):
            logits = self._append(embeddings[begin : begin + _PASS])
        return logits

    def rewind(self, length: int) -> None:
        """Forgets everything behind the first ``length`` positions: what the cache holds there no longer counts."""
        self._length = length

    def decode(self, token: int) -> NDArray[np.float32]:
        """Appends one token → logits of the next."""
        return self.extend(self.embed(np.array([token], np.int64)))

    def to_host(self, tensor: Array) -> Array:
        """The tensor itself: it is on the host."""
        return tensor

    def record_event(self) -> HostEvent:
        """Now: every stage returns when its work is done."""
        return HostEvent()

    def _append(self, embeddings: Array) -> NDArray[np.float32]:
        end = self._length + len(embeddings)
        # Where nothing stands yet, an empty cache spares the attention to rows that would not count.
        cache = self._cache if self._length else {name: rows[:, :0] for name, rows in self._cache.items()}
        positions = np.arange(self._length, end, dtype=np.int64)
        logits, *rows = _run(self._decoder, {"embeddings": embeddings, "positions": positions, **cache})
        for name, new in zip(self._cache, rows, strict=True):
            self._cache[name][:, self._length : end] = new
        self._length = end
        found: NDArray[np.float32] = logits
        return found


def _open(bundle: Bundle, name: GraphName, threads: int) -> Any:
    """The session of a graph, once its tensors are those that bundle.json tells of."""
    check_engine(bundle, name)
    session = open_session(bundle.graph(name), threads=threads)
    check_tensors(bundle, name, session)
    return session


def check_engine(bundle: Bundle, name: GraphName) -> None:
    """Refuses a graph that bundle.json says ONNX Runtime cannot run.

    Raises:
        TangoError: It is for other engines.
    """
    engines = bundle.manifest.graphs[name].runtimes
    if "onnxruntime" not in engines:
        raise TangoError(
            f"ONNX Runtime cannot run the {name} graph of {bundle.path}: it is for {', '.join(engines)}",
            "build engines of it: tango build, or calibrate to int8",
        )


def check_tensors(bundle: Bundle, name: GraphName, session: Any) -> None:
    """Refuses a graph whose tensors are not those that bundle.json tells of.

    Args:
        bundle: The bundle.
        name: The graph.
        session: Its ``onnxruntime.InferenceSession``.

    Raises:
        TangoError: A tensor has another name or shape.
    """
    spec = bundle.manifest.graphs[name]
    for told, found in ((spec.inputs, session.get_inputs()), (spec.outputs, session.get_outputs())):
        if [(t.name, list(t.shape)) for t in told] != [(t.name, t.shape) for t in found]:
            raise TangoError(
                f"the tensors of {bundle.graph(name)} are not those that bundle.json tells of",
                "copy the bundle again, or export it again",
            )


def _run(session: Any, feeds: dict[str, Array]) -> list[Array]:
    with refusing("run a graph", _VERIFY):
        outputs: list[Array] = session.run(None, feeds)
    return outputs


def empty_cache(specs: Sequence[TensorSpec], capacity: int) -> dict[str, Array]:
    """Keys and values for so many positions, [heads, capacity, width of a head] each, all zero.

    Args:
        specs: The cache's inputs of the decoder graph.
        capacity: Positions.
    """
    shapes = {t.name: [capacity if isinstance(n, str) else n for n in t.shape] for t in specs}
    return {t.name: np.zeros(shapes[t.name], t.dtype) for t in specs}


def _version() -> str:
    import onnxruntime

    version: str = onnxruntime.__version__
    return version
