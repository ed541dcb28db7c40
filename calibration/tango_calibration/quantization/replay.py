"""Graphs that are not on disk, run on captured inputs, with any of their tensors as additional outputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from tango_calibration.quantization.capture import DecoderInput
from tango_calibration.quantization.ranges import Array
from tango_plugins import TangoError
from tango_runtime.backends.ort_cpu import empty_cache
from tango_runtime.backends.ort_options import session_options
from tango_runtime.bundle import TensorSpec
from tango_runtime.util.errors import first_line

#: Prompt tokens per decoder pass: the activations of all layers of a pass are in memory at once.
CHUNK_TOKENS = 256


def open_graph(model: ModelProto, folder: Path, more: Sequence[str] = ()) -> onnxruntime.InferenceSession:
    """Opens a graph on ONNX Runtime's CPU provider.

    Args:
        model: The graph.
        folder: Folder of its external data.
        more: Tensors that become outputs, after the graph's own.

    Raises:
        TangoError: ONNX Runtime cannot load the graph.
    """
    extended = ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in more)
    options = session_options()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    if any(proto.data_type == TensorProto.FLOAT8E4M3FN for proto in model.graph.initializer):
        # It would move fp8 Q/DQ pairs across operators without fp8 kernels, and then reject its own graph.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(extended.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the errors of ONNX Runtime have no common class
        raise TangoError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load a quantized graph: {first_line(error)}",
            "install a newer onnxruntime",
        ) from error


def run_vision(session: onnxruntime.InferenceSession, frames: NDArray[np.uint8]) -> Iterator[list[Array]]:
    """Yields all outputs of the vision graph, frame by frame."""
    for i in range(len(frames)):
        yield session.run(None, {"frames": frames[i : i + 1]})


def run_decoder(
    session: onnxruntime.InferenceSession, specs: Sequence[TensorSpec], inputs: DecoderInput
) -> Iterator[list[Array]]:
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
    cache = empty_cache(specs[2:], 0)
    length = 0
    for chunk in itertools.chain(chunks, inputs.answer[:, None]):
        positions = np.arange(length, length + len(chunk), dtype=np.int64)
        logits, *rest = session.run(None, {"embeddings": chunk, "positions": positions, **cache})
        length += len(chunk)
        rows, more = rest[: len(cache)], rest[len(cache) :]
        cache = {name: np.concatenate((cache[name], new), 1) for name, new in zip(cache, rows, strict=True)}
        yield [logits, *more]
