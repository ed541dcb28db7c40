"""The bundle's graphs on ONNX Runtime's CUDA provider, reading and writing our device memory on our stream.

Decoding is bound once and run token by token; it is not recorded as a CUDA graph, since ONNX Runtime keeps the graph's
arithmetic on shapes on the CPU, and that cannot be recorded. That of a fused decoder can:
:mod:`tango_runtime.stages.fused`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_plugins.library import Memory
from tango_runtime.bundle import Bundle, GraphName
from tango_runtime.device import Stream
from tango_runtime.stages.cuda import CudaStages, Run, open_stream
from tango_runtime.stages.onnxruntime import check_tensors

_PROVIDER = "CUDAExecutionProvider"
#: The provider, and the device that tensors are bound on.
CUDA = (_PROVIDER, "cuda")
_GRAPHS: tuple[GraphName, ...] = ("vision", "embed", "decoder")

#: A tensor that can be bound: on the device, or a small one that an operator reads on the host.
Tensor = Memory | NDArray[Any]


def open_stages(bundle: Bundle) -> CudaStages:
    """Loads a bundle's graphs on the GPU.

    Raises:
        TangoError: ONNX Runtime with CUDA is not installed or cannot be used, there is no GPU, a graph cannot be
            loaded, or the CUDA library is not built.
    """
    from tango_runtime.stages.fused import FusedGraphs  # which is made of what is below

    onnxruntime = _onnxruntime()
    stream = open_stream()
    return CudaStages(bundle, FusedGraphs(onnxruntime, bundle, stream), stream)


class OrtGraphs:
    """Sessions on one stream; see :class:`tango_runtime.stages.cuda.Graphs`.

    Args:
        onnxruntime: The module.
        bundle: The bundle.
        stream: What they run on.
        provider: The provider, with the device that its tensors are bound on. Another than CUDA's is for tests.

    Raises:
        TangoError: A graph cannot be loaded on the provider.
    """

    #: Attention is not fused: its scores take 17 MB in fp16 for each frame of 384×384 and layer.
    frames_at_once = 8
    #: Likewise, the scores of a pass of the decoder are heads · tokens · positions.
    tokens_at_once = 2048
    capacity: int | None = None
    in_place = False
    #: The provider's options beyond those that all graphs have.
    settings: Mapping[GraphName, Mapping[str, str]] = MappingProxyType({})

    def __init__(self, onnxruntime: Any, bundle: Bundle, stream: Stream, provider: tuple[str, str] = CUDA) -> None:
        name, self._place = provider
        self._specs = bundle.manifest.graphs
        # No doubling of the arena: what one frame more needs is not worth twice the memory.
        common = {"user_compute_stream": str(stream.handle), "arena_extend_strategy": "kSameAsRequested"}
        # The only references to the sessions, so that they go when this is cleared.
        self._sessions = {
            graph: _open(onnxruntime, bundle, graph, name, common | dict(self.settings.get(graph, {})))
            for graph in _GRAPHS
        }
        stream.before_end(self._sessions.clear)
        self._options = run_options(onnxruntime)
        self._stream = stream
        self.description = f"ONNX Runtime {onnxruntime.__version__}, {name.removesuffix('ExecutionProvider')}"

    def dtype(self, graph: GraphName, tensor: str) -> str:
        """The graph's own type of a tensor."""
        spec = self._specs[graph]
        return next(t.dtype for t in (*spec.inputs, *spec.outputs) if t.name == tensor)

    def bind(self, graph: GraphName, tensors: Mapping[str, Memory], *, replay: bool = False) -> Run:
        """Prepares a session to read and write these tensors; gives the function that runs it."""
        return self._bound(graph, tensors, self._options)

    def _bound(self, graph: GraphName, tensors: Mapping[str, Tensor], options: Any) -> Run:
        inputs = {t.name for t in self._specs[graph].inputs}
        binding = self._sessions[graph].io_binding()
        for name, memory in tensors.items():
            if isinstance(memory, np.ndarray):
                binding.bind_cpu_input(name, memory)
                continue
            bind = binding.bind_input if name in inputs else binding.bind_output
            bind(name, self._place, 0, np.dtype(memory.dtype).type, memory.shape, memory.address)

        def run(_held: object = tensors) -> None:  # the binding does not keep what it reads on the host
            try:
                self._sessions[graph].run_with_iobinding(binding, options)
            except Exception as error:  # ONNX Runtime's errors have no common class
                raise TangoError(
                    f"ONNX Runtime cannot run {graph}: {str(error).splitlines()[0]}",
                    "use fewer frames, or end other programs on the GPU; see: tango doctor",
                ) from error

        return run


def run_options(onnxruntime: Any, **entries: str) -> Any:
    """Options of runs that do not wait for their end: the stream keeps the order, and a wait would only cost time."""
    options = onnxruntime.RunOptions()
    for name, value in {"disable_synchronize_execution_providers": "1", **entries}.items():
        options.add_run_config_entry(name, value)
    return options


def _open(onnxruntime: Any, bundle: Bundle, graph: GraphName, provider: str, settings: dict[str, str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    file = bundle.graph(graph)
    chosen = (provider, settings) if provider == _PROVIDER else provider
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=[chosen])
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise TangoError(
            f"ONNX Runtime cannot load {file} on the GPU: {str(error).splitlines()[0]}",
            "check the bundle with: tango inspect BUNDLE --verify, and the GPU with: tango doctor",
        ) from error
    if session.get_providers()[0] != provider:  # it would run on the CPU and say nothing
        raise TangoError(
            f"ONNX Runtime cannot use {provider}: its CUDA or cuDNN libraries are missing or of another version",
            "see: tango doctor",
        )
    check_tensors(bundle, graph, session)
    return session


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise TangoError("ONNX Runtime is not installed", "pip install 'tango-edge[gpu]'") from error
    if _PROVIDER not in onnxruntime.get_available_providers():
        raise TangoError(
            f"ONNX Runtime {onnxruntime.__version__} is the one without CUDA",
            "pip uninstall onnxruntime, then pip install 'tango-edge[gpu]': the two overwrite each other",
        )
    if hasattr(onnxruntime, "preload_dlls"):  # finds CUDA's libraries in the nvidia-* packages
        with redirect_stdout(sys.stderr):  # what it has to say is no part of an answer
            onnxruntime.preload_dlls()
    return onnxruntime
