"""The backend on ONNX Runtime's CPU provider; pruning is the NumPy reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, TangoError, reference, row_ends
from tango_plugins.device_array import DeviceArray
from tango_plugins.thinning import Thinning
from tango_runtime.backends.base import HostEvent, PrunedTokens, Trace, require_context
from tango_runtime.backends.host_ring import HostFeatureRing
from tango_runtime.backends.ort_options import session_options
from tango_runtime.backends.rotary import TEXT, RotaryIds
from tango_runtime.bundle import Bundle, GraphName, GraphSpec, TensorSpec
from tango_runtime.util.console import OnProgress
from tango_runtime.util.errors import first_line
from tango_runtime.util.versions import release
from tango_runtime.video.batch import FrameBatch
from tango_runtime.video.preprocess import preprocess
from tango_runtime.video.source import TimedFrame

Array = NDArray[Any]

#: Tokens of one pass of the prefill. Scores take heads · pass · positions · 4 bytes: in one pass, 6300 tokens that were
#: not pruned would take 2.2 GB in each layer of the 0.5B model.
PASS = 1024

#: A cache that must grow gets a multiple of this many positions.
_GROWTH = 256

#: The first version whose products of 8-bit blocks, which an int4 graph has for sensitive layers, are right on a CPU:
#: 1.22 gives other numbers, 1.21 and earlier refuse them. Tried with models/tiny.
_INT4 = (1, 23)

_VERIFY = "check the bundle with: tango inspect BUNDLE --verify"


def open_session(graph: Path, *, threads: int = 0) -> Any:
    """Loads an ONNX graph on ONNX Runtime's CPU provider.

    Args:
        graph: The ONNX file.
        threads: Threads of one operator; 0 takes one for each core.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        TangoError: ONNX Runtime is not installed, or cannot load the graph.
    """
    onnxruntime, options = _onnxruntime(), session_options(threads=threads)
    with ort_errors(f"load {graph}", _VERIFY):
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


@contextmanager
def ort_errors(what: str, hint: str) -> Iterator[None]:
    """Turns ONNX Runtime's errors, which have no common class, into ours.

    Args:
        what: What it is asked to do, as it follows "cannot".
        hint: What to do where it cannot.

    Raises:
        TangoError: It cannot.
    """
    try:
        yield
    except TangoError:
        raise
    except Exception as error:
        raise TangoError(f"ONNX Runtime cannot {what}: {first_line(error)}", hint) from error


class HostKVCache:
    """Keys and values on the host: for each tensor of the decoder's cache [heads, capacity, head_dim]."""

    def __init__(self, specs: Sequence[TensorSpec], capacity: int, rotary: RotaryIds) -> None:
        self.rows, self.rotary = empty_cache(specs, capacity), rotary
        self.capacity, self.length = capacity, 0

    def reserve(self, positions: int) -> None:
        """Makes room for ``positions`` positions in all."""
        if positions <= self.capacity:
            return
        capacity = -(-positions // _GROWTH) * _GROWTH
        for name, old in self.rows.items():
            self.rows[name] = np.zeros((old.shape[0], capacity, old.shape[2]), old.dtype)
            self.rows[name][:, : self.length] = old[:, : self.length]
        self.capacity = capacity

    def append(self, rows: Sequence[Array]) -> None:
        """Adds the rows of a pass, one tensor [heads, N, head_dim] for each of the cache's."""
        end = self.length + rows[0].shape[1]
        for name, new in zip(self.rows, rows, strict=True):
            self.rows[name][:, self.length : end] = new
        self.length = end

    def rewind(self, length: int) -> None:
        """Forgets everything after the first positions.

        It is cleared, too: what an overflow left there would spoil sums, even at weight 0.
        """
        for tensor in self.rows.values():
            tensor[:, length : self.length] = 0
        self.length = length

    def release(self) -> None:
        """Frees the memory."""
        self.rows = {}


class OrtCpuBackend:
    """A bundle's graphs on ONNX Runtime's CPU provider.

    Args:
        bundle: The bundle.
        threads: Threads of one operator; 0 takes one for each core.

    Raises:
        TangoError: ONNX Runtime is not installed, or a graph cannot be loaded.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        self._vision, self._embed = (open_graph(bundle, name, threads) for name in ("vision", "embed"))
        self._decoder = open_graph(bundle, bundle.manifest.decoders[-1], threads)
        self._cache_specs = cache_inputs(bundle.manifest.graphs[bundle.manifest.decoders[-1]])
        self._rotary = bundle.manifest.decoder.rotary is not None
        self._context = bundle.manifest.decoder.context
        self.description, self.fallback_reason = f"ONNX Runtime {_onnxruntime().__version__}, CPU", ""
        self.frame_size = None
        self.sequences = 1

    def batch(self, sequences: int) -> None:
        """Nothing: sequences are decoded one after the other."""

    def load_frames(self, timed: Iterable[TimedFrame], count: int, size: tuple[int, int]) -> FrameBatch:
        """Reads ``count`` frames of any size → frames of a size (H, W)."""
        return preprocess(timed, size)

    def vision(self, frames: NDArray[np.uint8] | DeviceArray, on_progress: OnProgress) -> tuple[Array, Array]:
        """Steps of frames [F, ...] → features [F, L, D] and salience [F, L]; ``on_progress`` gets the number done."""
        if isinstance(frames, DeviceArray):
            raise TangoError("frames on a device were given to the CPU backend", "take a backend on that device")
        parts = []
        for i in range(len(frames)):
            # One step at a time: on a CPU a batch is no faster, and its scores would take F times the memory.
            parts.append(run_graph(self._vision, {"frames": frames[i : i + 1]}))
            on_progress(1)
        features, salience = (np.concatenate(part) for part in zip(*parts, strict=True))
        return features, salience

    def new_ring(self, steps: int) -> HostFeatureRing:
        """An empty ring for ``steps`` steps of frames."""
        return HostFeatureRing(steps)

    def prune(
        self, features: Array, salience: Array, seconds: NDArray[np.float32], params: PruneParams
    ) -> PrunedTokens:
        """Features, salience and frame times in seconds → the tokens that are kept."""
        pruned = reference.prune(features, salience, seconds, params)
        trace = Trace(pruned.indices, pruned.merged, pruned.segments)
        return PrunedTokens(pruned.tokens, pruned.indices, pruned.count, lambda: trace)

    def flatten(self, features: Array) -> Array:
        """[F, L, D] → [F·L, D]."""
        return features.reshape(-1, features.shape[-1])

    def with_row_ends(self, kept: PrunedTokens, columns: int, end: int) -> tuple[Array, int]:
        """Kept tokens with a row end after each grid row that keeps one."""
        rows = row_ends.with_row_ends(kept.tokens, kept.indices, columns, self.embed(np.array([end]))[0])
        return rows, len(rows)

    def embed(self, ids: NDArray[np.int64]) -> Array:
        """[N] → embeddings [N, D]."""
        embeddings: Array = run_graph(self._embed, {"ids": ids})[0]
        return embeddings

    def new_cache(self, capacity: int, rotary: RotaryIds = TEXT) -> HostKVCache:
        """An empty sequence with room for ``capacity`` positions."""
        return HostKVCache(self._cache_specs, capacity, rotary)

    def reserve(self, cache: HostKVCache, positions: int) -> None:
        """Makes room for ``positions`` positions in all."""
        cache.reserve(positions)

    def extend(
        self, cache: HostKVCache, pieces: Sequence[Array], thinning: Thinning | None = None
    ) -> NDArray[np.float32]:
        """Appends embeddings, [N, D] in all → logits of the last position."""
        assert thinning is None
        embeddings, before = np.concatenate(pieces), cache.length
        require_context(before, len(embeddings), self._context)
        cache.reserve(before + len(embeddings))
        try:
            for begin in range(0, len(embeddings), PASS):
                logits = self._append(cache, embeddings[begin : begin + PASS])
        except BaseException:
            cache.rewind(before)
            raise
        return logits

    def decode(self, cache: HostKVCache, token: int) -> NDArray[np.float32]:
        """Appends one token → logits of its position."""
        return self.extend(cache, [self.embed(np.array([token], np.int64))])

    def decode_together(self, steps: Sequence[tuple[HostKVCache, int]]) -> list[NDArray[np.float32]]:
        """Appends one token to a sequence → its logits."""
        return [self.decode(cache, token) for cache, token in steps]

    def fork(self, cache: HostKVCache, length: int, capacity: int) -> HostKVCache:
        """Another sequence that begins with the first ``length`` positions of a sequence."""
        found = self.new_cache(max(length, capacity), cache.rotary)
        found.append([rows[:, :length] for rows in cache.rows.values()])
        return found

    def rewind(self, cache: HostKVCache, length: int) -> None:
        """Forgets everything after the first ``length`` positions."""
        cache.rewind(length)

    def to_host(self, tensor: Array) -> Array:
        """The tensor itself: it is on the host."""
        return tensor

    def record_event(self) -> HostEvent:
        """Now: every stage returns when its work is done."""
        return HostEvent()

    def _append(self, cache: HostKVCache, embeddings: Array) -> NDArray[np.float32]:
        """One pass of the decoder."""
        begin, end = cache.length, cache.length + len(embeddings)
        feeds = {"embeddings": embeddings, "positions": np.arange(begin, end, dtype=np.int64)}
        if self._rotary:
            feeds["rotary"] = cache.rotary.at(begin, end)
        # An empty cache spares attention the rows that would not count.
        past = cache.rows if cache.length else {name: rows[:, :0] for name, rows in cache.rows.items()}
        logits, *rows = run_graph(self._decoder, {**feeds, **past})
        cache.append(rows)
        found: NDArray[np.float32] = logits
        return found


def open_backend(bundle: Bundle, threads: int) -> OrtCpuBackend:
    """Loads a bundle's graphs on the CPU; raises what :class:`OrtCpuBackend` does."""
    if bundle.manifest.decoder.inner is None:
        return OrtCpuBackend(bundle, threads=threads)
    from tango_runtime.backends.ort_cpu_thinning import ThinningOrtCpuBackend

    return ThinningOrtCpuBackend(bundle, threads=threads)


def open_graph(bundle: Bundle, name: GraphName, threads: int) -> Any:
    """The session of a graph, once its tensors are those that bundle.json lists."""
    check_runtime(bundle, name)
    session = open_session(bundle.graph(name), threads=threads)
    check_tensors(bundle, name, session)
    return session


def check_runtime(bundle: Bundle, name: GraphName) -> None:
    """Rejects a graph that bundle.json says ONNX Runtime cannot run, or that this version does not.

    Raises:
        TangoError: It is for TensorRT only, or needs a newer ONNX Runtime.
    """
    spec = bundle.manifest.graphs[name]
    if spec.device and "onnxruntime" not in spec.runtimes and "onnxruntime" in spec.device.runtimes:
        raise TangoError(
            f"ONNX Runtime runs the {name} graph of {bundle.path} on a GPU only",
            "use --backend ort-cuda on a GPU, or calibrate to int8",
        )
    if "onnxruntime" not in spec.runtimes:
        raise TangoError(
            f"ONNX Runtime cannot run the {name} graph of {bundle.path}: it is for {', '.join(spec.runtimes)}",
            "build engines of it: tango build, or calibrate to int8",
        )
    if spec.quantization and spec.quantization.precision == "int4":
        version = _onnxruntime().__version__
        if release(version) < _INT4:
            raise TangoError(
                f"ONNX Runtime {version} does not compute the {name} graph of {bundle.path} correctly: it is int4",
                f"pip install 'onnxruntime>={'.'.join(map(str, _INT4))}'",
            )


def check_tensors(bundle: Bundle, name: GraphName, session: Any) -> None:
    """Rejects a graph whose tensors are not those that bundle.json lists.

    Args:
        bundle: The bundle.
        name: The graph.
        session: Its ``onnxruntime.InferenceSession``.

    Raises:
        TangoError: A tensor has another name or shape.
    """
    spec = bundle.manifest.graphs[name]
    for listed, found in ((spec.inputs, session.get_inputs()), (spec.outputs, session.get_outputs())):
        if [(t.name, list(t.shape)) for t in listed] != [(t.name, t.shape) for t in found]:
            raise TangoError(
                f"the tensors of {bundle.graph(name)} are not those that bundle.json lists",
                "copy the bundle again, or export it again",
            )


def run_graph(session: Any, feeds: dict[str, Array]) -> list[Array]:
    """All outputs of a graph, in order."""
    with ort_errors("run a graph", _VERIFY):
        outputs: list[Array] = session.run(None, feeds)
    return outputs


def cache_inputs(graph: GraphSpec) -> tuple[TensorSpec, ...]:
    """The inputs of a decoder graph that are its cache."""
    return tuple(tensor for tensor in graph.inputs if tensor.name.startswith("past_"))


def cache_rows(graph: GraphSpec) -> tuple[TensorSpec, ...]:
    """The outputs of a decoder graph that bring new rows of its cache, in the order of its inputs."""
    return graph.outputs[-len(cache_inputs(graph)) :]


def empty_cache(specs: Sequence[TensorSpec], capacity: int) -> dict[str, Array]:
    """Keys and values for ``capacity`` positions, [heads, capacity, head_dim] each, all zero.

    Args:
        specs: The cache's inputs of the decoder graph.
        capacity: Positions.
    """
    shapes = {t.name: [capacity if isinstance(n, str) else n for n in t.shape] for t in specs}
    return {t.name: np.zeros(shapes[t.name], t.dtype) for t in specs}


def _onnxruntime() -> Any:
    """The module; it is imported where it is used.

    Raises:
        TangoError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise TangoError("ONNX Runtime is not installed", "pip install 'tango-edge[cpu]'") from error
    return onnxruntime
