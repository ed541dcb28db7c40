"""Graphs in other forms, run on captured inputs, with any of their tensors as additional outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from tango_calibration.quantization.arithmetic import FP8
from tango_calibration.quantization.capture import DecoderInput
from tango_calibration.quantization.ranges import Array
from tango_calibration.quantization.stored import StoredGraph
from tango_export.graph import PORTABLE, Form
from tango_export.graph.builder import Weight
from tango_export.graph.files import external_tensor, load, model_proto
from tango_plugins import TangoError
from tango_plugins.thinning import thin
from tango_runtime.backends.cuda.backend import open_stream
from tango_runtime.backends.cuda.ort import onnxruntime_with_cuda
from tango_runtime.backends.ort_cpu import cache_inputs, empty_cache
from tango_runtime.backends.ort_options import session_options
from tango_runtime.bundle import GraphName, GraphSpec, WeightSpec
from tango_runtime.util.errors import first_line

#: The backends: the one of everything that is not asked to run elsewhere, and a GPU's.
CPU, CUDA = "ort-cpu", "ort-cuda"

#: The providers of ONNX Runtime by backend. On a GPU, fp32 is not rounded to TF32, as in the pipeline.
_PROVIDERS: dict[str, list[tuple[str, dict[str, str]]]] = {
    CPU: [("CPUExecutionProvider", {})],
    CUDA: [("CUDAExecutionProvider", {"use_tf32": "0"})],
}

#: Prompt tokens per decoder pass: the activations of all layers of a pass are in memory at once.
CHUNK_TOKENS = 256


def usable(backend: str) -> str:
    """The backend to calibrate on; ``auto`` is a GPU where ONNX Runtime can use one.

    Raises:
        TangoError: Calibration does not run on that backend.
    """
    if backend == "auto":
        try:
            open_stream()
            onnxruntime_with_cuda()
        except TangoError:
            return CPU
        return CUDA
    if backend not in _PROVIDERS:
        raise TangoError(f"calibration does not run on {backend}", f"use --backend {' or '.join(_PROVIDERS)}")
    return backend


class Session:
    """A graph on ONNX Runtime.

    Args:
        model: A file, or a graph whose weights are elsewhere.
        options: ONNX Runtime's options.
        weights: Weights by name, which the session reads in place.
        backend: ``ort-cpu`` or ``ort-cuda``.

    Raises:
        TangoError: ONNX Runtime cannot load the graph.
    """

    def __init__(
        self,
        model: str | bytes,
        options: onnxruntime.SessionOptions,
        weights: Mapping[str, Array] | None = None,
        backend: str = CPU,
    ) -> None:
        self._weights, self._given = dict(weights or {}), dict[str, Array]()
        if backend == CUDA:
            onnxruntime_with_cuda()
        values = [_ort_value(tensor) for tensor in self._weights.values()]
        options.add_external_initializers(list(self._weights), values)
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=_PROVIDERS[backend])
        except Exception as error:  # the errors of ONNX Runtime have no common class
            raise TangoError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load a quantized graph: {first_line(error)}",
                "install a newer onnxruntime",
            ) from error
        provider, *_ = _PROVIDERS[backend]
        if self._session.get_providers()[0] != provider[0]:  # it would run on the CPU in silence
            raise TangoError(f"ONNX Runtime cannot use {provider[0]}", "see: tango doctor")

    def given(self, feeds: Mapping[str, Array]) -> Session:
        """The same session with fixed values for some of its inputs."""
        other = copy(self)
        other._given = {**self._given, **feeds}
        return other

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Runs the graph; returns all outputs."""
        outputs: list[Array] = self._session.run(None, {**self._given, **feeds})
        return outputs


#: The graphs of vision or of a decoder, in order.
Sessions = Mapping[GraphName, Session]


def open_graph(
    stored: StoredGraph, form: Form = PORTABLE, more: Sequence[str] = (), *, threads: int = 0, backend: str = CPU
) -> Session:
    """Opens a graph in another form.

    ONNX Runtime reads the weights that the bundle stores from its data file; other weights are made in memory.

    Args:
        stored: The graph.
        form: How its layers become nodes.
        more: Tensors to add as outputs, after the graph's own.
        threads: Threads of one operator; 0 takes one per core.
        backend: What runs it, as for :class:`Session`.

    Raises:
        TangoError: ONNX Runtime cannot load the graph.
    """
    graph, places, made, initializers = stored.build(form), stored.spec.weights or {}, {}, []
    for weight in graph.weights:
        if weight.name not in places:
            made[weight.name] = load(weight, stored.read)
        place = places.get(weight.name, WeightSpec(weight.dtype, weight.shape, 0))
        initializers.append(external_tensor(weight.name, place, stored.spec.data))
    model = model_proto(graph, graph.inputs, initializers)
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in more)
    options = _options(graph.weights, threads)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(stored.folder.resolve())
    )
    return Session(model.SerializeToString(), options, made, backend)


def open_written(folder: Path, spec: GraphSpec, backend: str = CPU) -> Session:
    """Opens a graph of a folder on a backend, as for :class:`Session`.

    Raises:
        TangoError: ONNX Runtime cannot load it.
    """
    return Session(str(folder / spec.file), _options((spec.weights or {}).values()), backend=backend)


def _options(weights: Iterable[Weight | WeightSpec], threads: int = 0) -> onnxruntime.SessionOptions:
    options = session_options(threads=threads)
    if any(weight.dtype == FP8.type for weight in weights):
        # It would move fp8 Q/DQ pairs across operators without fp8 kernels, and then reject its own graph.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _ort_value(tensor: Array) -> onnxruntime.OrtValue:
    kind = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor, kind)


def run_vision(session: Session, frames: NDArray[np.uint8]) -> Iterator[list[Array]]:
    """Yields all outputs of the vision graph for each step of frames."""
    for i in range(len(frames)):
        yield session.run({"frames": frames[i : i + 1]})


def run_decoder(
    sessions: Sessions, specs: Mapping[GraphName, GraphSpec], inputs: DecoderInput
) -> Iterator[tuple[GraphName, list[Array]]]:
    """Runs a decoder of one graph, or of two, over a prompt in chunks, then over the answer token by token.

    Args:
        sessions: The decoder's graphs, or graphs made from them, in order. The prompt is thinned between two.
        specs: Entries of the graphs in bundle.json.
        inputs: The decoder's input.

    Yields:
        For each pass, the graph, its first output (rows [N, D] of a lower graph, otherwise logits [vocabulary]), and
        the outputs after the new rows of its KV cache.
    """
    parts = [_DecoderPart(name, session, specs[name], inputs.rotary) for name, session in sessions.items()]
    rows, thinning = inputs.prompt, inputs.thinning
    places: NDArray[np.int64] = np.arange(len(rows))
    for part in parts:
        passes = []
        for begin in range(0, len(rows), CHUNK_TOKENS):
            chunk = slice(begin, begin + CHUNK_TOKENS)
            outputs, more = part.run(rows[chunk], places[chunk])
            yield part.name, [outputs[0], *more]
            passes.append(outputs)
        if part is not parts[-1]:
            rows, share = np.concatenate([given for given, _ in passes]), passes[-1][1]
            if thinning is not None:
                rows, places = thin(rows, share, thinning)
    for place, row in enumerate(inputs.answer, len(inputs.prompt)):
        x = row[None]
        for part in parts:
            (x, *_), more = part.run(x, np.array([place]))
            yield part.name, [x, *more]


class _DecoderPart:
    """A graph of a decoder, and its KV cache.

    Args:
        name: The graph.
        session: It, or a graph made from it.
        spec: Its entry in bundle.json.
        rotary: Rotary positions of the sequence on three axes [3, positions].
    """

    def __init__(self, name: GraphName, session: Session, spec: GraphSpec, rotary: NDArray[np.int64]) -> None:
        self.name, self._session, self._rotary = name, session, rotary
        self._cache, self._length = empty_cache(cache_inputs(spec), 0), 0
        self._inputs = {tensor.name: tensor for tensor in spec.inputs if tensor.name not in self._cache}
        self._own = len(spec.outputs) - len(self._cache)

    def run(self, rows: Array, places: NDArray[np.int64]) -> tuple[list[Array], list[Array]]:
        """Rows [N, D] at these positions of the sequence → the outputs before the new rows of the cache, and after."""
        begin, self._length = self._length, self._length + len(rows)
        feeds = {next(iter(self._inputs)): rows, "positions": np.arange(begin, self._length, dtype=np.int64)}
        if "rotary" in self._inputs:
            feeds["rotary"] = self._rotary[:, places] if len(self._inputs["rotary"].shape) == 2 else places
        outputs, own = self._session.run({**feeds, **self._cache}), self._own
        new, more = outputs[own : own + len(self._cache)], outputs[own + len(self._cache) :]
        for name, added in zip(self._cache, new, strict=True):
            self._cache[name] = np.concatenate((self._cache[name], added), 1)
        return outputs[:own], more
