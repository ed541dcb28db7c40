"""Graphs in other forms, run on captured inputs, with any of their tensors as additional outputs."""

from __future__ import annotations

import itertools
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
from tango_runtime.backends.ort_cpu import empty_cache
from tango_runtime.backends.ort_options import session_options
from tango_runtime.bundle import GraphSpec, TensorSpec, WeightSpec
from tango_runtime.util.errors import first_line

#: Prompt tokens per decoder pass: the activations of all layers of a pass are in memory at once.
CHUNK_TOKENS = 256


class Session:
    """A graph on ONNX Runtime's CPU provider.

    Args:
        model: A file, or a graph whose weights are elsewhere.
        options: ONNX Runtime's options.
        weights: Tensors that the session reads in place.

    Raises:
        TangoError: ONNX Runtime cannot load the graph.
    """

    def __init__(
        self, model: str | bytes, options: onnxruntime.SessionOptions, weights: Mapping[str, Array] | None = None
    ) -> None:
        self._weights, self._given = dict(weights or {}), dict[str, Array]()
        values = [_ort_value(tensor) for tensor in self._weights.values()]
        options.add_external_initializers(list(self._weights), values)
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the errors of ONNX Runtime have no common class
            raise TangoError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load a quantized graph: {first_line(error)}",
                "install a newer onnxruntime",
            ) from error

    def given(self, feeds: Mapping[str, Array]) -> Session:
        """The same session, with some of its inputs given."""
        other = copy(self)
        other._given = {**self._given, **feeds}
        return other

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """All outputs."""
        outputs: list[Array] = self._session.run(None, {**self._given, **feeds})
        return outputs


def open_graph(stored: StoredGraph, form: Form = PORTABLE, more: Sequence[str] = (), *, threads: int = 0) -> Session:
    """Opens a graph in another form.

    What the bundle stores stays in its file, from where ONNX Runtime takes it; other weights are made, in memory.

    Args:
        stored: The graph.
        form: How its layers become nodes.
        more: Tensors that become outputs, after the graph's own.
        threads: Threads of one operator; 0 takes one for each core.

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
    return Session(model.SerializeToString(), options, made)


def open_written(folder: Path, spec: GraphSpec) -> Session:
    """Opens a graph of a folder.

    Raises:
        TangoError: ONNX Runtime cannot load it.
    """
    return Session(str(folder / spec.file), _options((spec.weights or {}).values()))


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
    """Yields all outputs of the vision graph, step by step of frames."""
    for i in range(len(frames)):
        yield session.run({"frames": frames[i : i + 1]})


def run_decoder(session: Session, specs: Sequence[TensorSpec], inputs: DecoderInput) -> Iterator[list[Array]]:
    """Runs the decoder over a prompt in chunks, then over the answer token by token.

    Args:
        session: The decoder, or a graph made from it.
        specs: The decoder's inputs.
        inputs: What it takes.

    Yields:
        Logits [vocabulary], then the outputs after the new rows of the key/value cache, for each pass.
    """
    prompt = inputs.prompt
    chunks = [prompt[begin : begin + CHUNK_TOKENS] for begin in range(0, len(prompt), CHUNK_TOKENS)]
    cache = empty_cache([spec for spec in specs if spec.name.startswith("past_")], 0)
    rotary, length = "rotary" in {spec.name for spec in specs}, 0
    for chunk in itertools.chain(chunks, inputs.answer[:, None]):
        begin, length = length, length + len(chunk)
        feeds = {"embeddings": chunk, "positions": np.arange(begin, length, dtype=np.int64)}
        if rotary:
            feeds["rotary"] = inputs.rotary[:, begin:length]
        logits, *rest = session.run({**feeds, **cache})
        rows, more = rest[: len(cache)], rest[len(cache) :]
        cache = {name: np.concatenate((cache[name], new), 1) for name, new in zip(cache, rows, strict=True)}
        yield [logits, *more]
