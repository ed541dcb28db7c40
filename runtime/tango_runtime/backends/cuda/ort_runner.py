"""Sessions of ONNX Runtime on a GPU, reading and writing our device memory on our stream.

Decoding is bound once and run token by token; it is not recorded as a CUDA graph, since ONNX Runtime keeps the graph's
arithmetic on shapes on the CPU, and that cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tango_plugins import TangoError
from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.device import Pool, Stream
from tango_runtime.backends.cuda.runner import BatchedStep, DeviceStep, Run
from tango_runtime.backends.ort_cpu import check_runtime, check_tensors, ort_errors
from tango_runtime.backends.ort_options import session_options
from tango_runtime.bundle import Bundle, GraphName

PROVIDER = "CUDAExecutionProvider"
#: TensorProto.FLOAT8E4M3FN of ONNX.
_FLOAT8_E4M3FN = 17
#: The provider, and the device that tensors are bound on.
CUDA = (PROVIDER, "cuda")


class OrtRunner:
    """Sessions on one stream; see :class:`tango_runtime.backends.cuda.runner.GraphRunner`.

    Args:
        onnxruntime: The module.
        bundle: The bundle.
        stream: What they run on.
        provider: The provider, with the device that its tensors are bound on. Another than CUDA's is for tests.
        operators: The library of the operators that graphs have beside ONNX Runtime's; without it, the graphs' own
            function bodies of these operators run.

    Raises:
        TangoError: The library cannot be registered, or a graph cannot be loaded on the provider.
    """

    #: Attention is not fused: its scores take 17 MB in fp16 for each frame of 384×384 and layer.
    steps_at_once = 8
    fuses_vision = False
    #: The scores of a pass of the decoder are heads · tokens · positions.
    tokens_at_once = 2048
    frame_size = None
    capacity: int | None = None
    in_place = False
    #: Graphs whose runs wait for their end, which costs time. The plain graphs have products of batches of two lengths,
    #: for which ONNX Runtime keeps lists of addresses in pinned memory until a later run waits. If the session is
    #: destroyed before, a callback of the stream frees them, which CUDA forbids there, and the process is aborted.
    waiting: Collection[GraphName] = ("vision", "decoder", "decoder_low", "decoder_high")

    def __init__(
        self,
        onnxruntime: Any,
        bundle: Bundle,
        stream: Stream,
        provider: tuple[str, str] = CUDA,
        operators: Path | None = None,
    ) -> None:
        name, self._place = provider
        options = _options(operators)
        self._specs = bundle.manifest.graphs
        # No doubling of the arena: what one frame more needs is not worth twice the memory.
        settings = {
            "user_compute_stream": str(stream.handle),
            "arena_extend_strategy": "kSameAsRequested",
            # fp32 is fp32: TF32 would round the salience to 10 bits, and so decide which tokens are kept.
            "use_tf32": "0",
        }
        # The only references to the sessions, and to the bindings, which hold them: they go when these are cleared. A
        # graph has one binding, and one more if it is replayed; it keeps what is not bound anew.
        self._bindings: dict[tuple[GraphName, bool], Any] = {}
        self._sessions: dict[GraphName, Any] = {}
        stream.before_end(self._bindings.clear)
        stream.before_end(self._sessions.clear)

        def load(graph: GraphName) -> None:
            self._sessions[graph] = _open(onnxruntime, bundle, graph, options, name, settings)

        graphs: tuple[GraphName, ...] = ("vision", *bundle.manifest.decoders)
        *others, decoder = graphs
        with ThreadPoolExecutor() as threads:
            loading = threads.map(load, others)
            load(decoder)  # in this thread, where ctrl-C is heard
            list(loading)  # raises the error of the first of them that has one
        self._onnxruntime = onnxruntime
        self.description = f"ONNX Runtime {onnxruntime.__version__}, {name.removesuffix('ExecutionProvider')}"

    def dtype(self, graph: GraphName, tensor: str) -> str:
        """The graph's own type of a tensor."""
        spec = self._specs[graph]
        return next(t.dtype for t in (*spec.inputs, *spec.outputs) if t.name == tensor)

    def bind(self, graph: GraphName, tensors: Mapping[str, DeviceArray], *, replay: bool = False) -> Run:
        """Prepares a session to read and write these tensors; gives the function that runs it."""
        return self._bind(graph, tensors, replay)

    def step(self, cache: Sequence[DeviceArray], pool: Pool) -> DeviceStep | None:
        """None: a step is a pass of the sessions."""
        return None

    def batched_step(self, pool: Pool) -> BatchedStep | None:
        """None: a pass of the sessions is over one sequence."""
        return None

    def _bind(self, graph: GraphName, tensors: Mapping[str, DeviceArray], replay: bool = False) -> Run:
        options = self._onnxruntime.RunOptions()
        if graph not in self.waiting:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        inputs = {t.name for t in self._specs[graph].inputs}
        if (graph, replay) not in self._bindings:
            self._bindings[graph, replay] = self._sessions[graph].io_binding()
        binding = self._bindings[graph, replay]
        for name, memory in tensors.items():
            bind = binding.bind_input if name in inputs else binding.bind_output
            bind(name, self._place, 0, _element_type(memory.dtype), memory.shape, memory.address)

        def run() -> None:
            with ort_errors(f"run {graph}", "use fewer frames, or end other programs on the GPU; see: tango doctor"):
                self._sessions[graph].run_with_iobinding(self._bindings[graph, replay], options)

        return run


def _element_type(dtype: str) -> Any:
    """A type as ONNX Runtime's bindings take it: NumPy's, or ONNX's number of one that NumPy does not have."""
    return _FLOAT8_E4M3FN if dtype == "float8_e4m3fn" else np.dtype(dtype).type


def _options(operators: Path | None) -> Any:
    options = session_options()
    # From the second run of a shape on there would be one more block of memory, as large as the activations' peak,
    # beside what the first run took.
    options.enable_mem_pattern = False
    if operators is not None:
        options.add_session_config_entry("tango.interleaved", "1")  # see Weights.interleave()
        with ort_errors(f"take the operators of {operators}", "build it: tango plugin build"):
            options.register_custom_ops_library(str(operators))
    return options


def _open(
    onnxruntime: Any, bundle: Bundle, graph: GraphName, options: Any, provider: str, settings: dict[str, str]
) -> Any:
    check_runtime(bundle, graph)
    file = bundle.graph(graph)
    chosen = (provider, settings) if provider == PROVIDER else provider
    hint = "check the bundle with: tango inspect BUNDLE --verify, and the GPU with: tango doctor"
    with ort_errors(f"load {file} on the GPU", hint):
        session = onnxruntime.InferenceSession(str(file), options, providers=[chosen])
    if session.get_providers()[0] != provider:  # it would run on the CPU in silence
        raise TangoError(
            f"ONNX Runtime cannot use {provider}: its CUDA or cuDNN libraries are missing or of another version",
            "see: tango doctor",
        )
    check_tensors(bundle, graph, session)
    return session
