"""The bundle's graphs as TensorRT engines: those that `tango build` made, found by :func:`tango_runtime.engines.find`.

Written for the Python API of TensorRT 8.5 to 11 (named tensors, ``execute_async_v3``); what differs between them is in
the functions at the end of this file.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from tango_plugins import TangoError
from tango_plugins.device_array import DeviceArray
from tango_runtime import engines
from tango_runtime.backends.cuda.backend import CudaBackend, open_stream
from tango_runtime.backends.cuda.device import Buffer, Pool, Stream
from tango_runtime.backends.cuda.device_decoder import DeviceDecoder
from tango_runtime.backends.cuda.products import start_products
from tango_runtime.backends.cuda.runner import BatchedStep, DeviceStep, Run
from tango_runtime.backends.cuda.weights import upload_weights
from tango_runtime.bundle import Bundle, GraphName
from tango_runtime.engines import PREFILL, BuiltEngine
from tango_runtime.engines.plugins import load_plugins
from tango_runtime.engines.target import current_target
from tango_runtime.system import gpu as system
from tango_runtime.system.packages import import_tensorrt

_TYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"}


def open_backend(bundle: Bundle, threads: int = 0, *, nvdec: bool = False) -> CudaBackend:
    """Loads a bundle's engines.

    Raises:
        TangoError: TensorRT is not installed, there is no GPU, an engine is missing or does not fit this machine, or
            the CUDA library is not built.
    """
    with ThreadPoolExecutor(1) as thread:  # CUDA, then cuBLASLt: each takes some tenths of a second to start
        opening = thread.submit(open_stream)
        trt = import_tensorrt()
        stream = opening.result()  # before anything else: TensorRT crashes where there is no GPU
        machine = current_target(trt.__version__)
        # Prune is the CUDA library's, embeddings come from the host: see tango_runtime.backends.cuda.backend.
        graphs: tuple[GraphName, ...] = ("vision", *bundle.manifest.decoders)
        found = {graph: engines.find(bundle, graph, machine) for graph in graphs}  # all, before the first is loaded
        starting: Future[None] | None = None
        if plugins := _plugins(found.values()):
            load_plugins(trt, plugins)
            if any(bundle.manifest.graphs[graph].quantization is None for graph in graphs):
                starting = thread.submit(start_products, plugins)
        backend = CudaBackend(bundle, TensorRTRunner(trt, bundle, found, stream, machine.gpu), stream, nvdec=nvdec)
        if starting is not None:
            starting.result()
        return backend


def _plugins(found: Iterable[BuiltEngine]) -> Path | None:
    """The library of the plugins that engines have and do not contain; None if there are none."""
    if not any(engine.plugins and not engine.version_compatible for engine in found):  # which embeds them
        return None
    plugin = system.plugin()
    assert plugin is not None, "an engine with plugins fits no machine without them"
    return plugin.path


class TensorRTRunner:
    """Engines and their contexts on one stream; see :class:`tango_runtime.backends.cuda.runner.GraphRunner`.

    Engines run one after the other, so they share one piece of scratch memory, as large as the neediest wants it. A
    context that replays has a CUDA graph recorded from it and is used for nothing else. Engines of device graphs are
    given the addresses of weights that lie on the device once.

    Args:
        trt: The ``tensorrt`` module.
        bundle: The bundle.
        found: Its engines.
        stream: What they run on.
        gpu: What the GPU is called.

    Raises:
        TangoError: An engine cannot be loaded, or its tensors are not the graph's.
    """

    fuses_vision = False

    def __init__(
        self, trt: Any, bundle: Bundle, found: Mapping[GraphName, BuiltEngine], stream: Stream, gpu: str
    ) -> None:
        self._trt, self._found, self._stream = trt, found, stream
        self._logger = _logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engines: dict[GraphName, Any] = {}
        on_device = {graph for graph, engine in found.items() if engine.form == "device"}
        self.in_place = "decoder" in on_device
        self._weights = upload_weights(bundle, on_device, lambda: self._load_all(bundle))
        self._decoder = DeviceDecoder(bundle.manifest, self._weights, stream) if self.in_place else None
        self._scratch = Buffer(max(map(_scratch_bytes, self._engines.values())))
        self._contexts = {graph: self._context(graph, PREFILL) for graph in found}
        self._replaying: dict[GraphName, Any] = {}  # contexts that a CUDA graph was recorded from
        self._bound: dict[tuple[GraphName, bool], dict[str, DeviceArray]] = {}  # to each of the two kinds of contexts
        for graph in on_device:
            weights = {name: self._weights[graph][name] for name in bundle.manifest.graphs[graph].device_weights}
            self._give(graph, self._contexts[graph], (), weights)
        decoders = [found[graph] for graph in bundle.manifest.decoders]
        self.tokens_at_once = min(each.max_size("N", PREFILL) for each in decoders)
        self.capacity = min(each.max_size("P", -1) for each in decoders)
        self.steps_at_once, self.frame_size = None, None
        if bundle.manifest.video.budget is not None:
            vision = found["vision"]
            self.steps_at_once = vision.max_size("F")
            self.frame_size = vision.max_size("H"), vision.max_size("W")
        self.description = f"TensorRT {trt.__version__}, {gpu}"
        if cautions := [each.warning for each in found.values() if each.warning]:
            self.description += f" ({'; '.join(cautions)})"

    def dtype(self, graph: GraphName, tensor: str) -> str:
        """What the engine takes for a tensor, by NumPy's name."""
        if self._decoder and tensor == "positions":
            return self._decoder.positions
        return _TYPES[self._engines[graph].get_tensor_dtype(tensor).name]

    def bind(self, graph: GraphName, tensors: Mapping[str, DeviceArray], *, replay: bool = False) -> Run:
        """Prepares an engine to read and write these tensors; gives the function that runs it."""
        found = self._found[graph]
        if self._decoder and graph == "decoder":
            tensors = self._decoder.tensors(graph, tensors)
        # TensorRT 8 lets no two contexts share a profile, so replays have the engine's last one to themselves.
        profile = len(found.profiles) - 1 if replay else PREFILL
        inputs = {tensor.name: tensors[tensor.name].shape for tensor in found.inputs}
        found.check(inputs, profile)
        context = self._replay_context(graph, profile) if replay else self._contexts[graph]
        bound = self._bound.setdefault((graph, replay), {})
        new = {name: memory for name, memory in tensors.items() if bound.get(name) != memory}
        bound.clear()
        self._give(graph, context, inputs, new)
        bound.update(tensors)

        def run() -> None:
            if not context.execute_async_v3(self._stream.handle):
                raise self._failed(f"{found.path} cannot run")

        return self._record(run) if replay else run

    def step(self, cache: Sequence[DeviceArray], pool: Pool) -> DeviceStep | None:
        """The CUDA library's, where the decoder's engine is of a device graph; else a step is a pass of the engines."""
        return self._decoder.step(cache, pool) if self._decoder else None

    def batched_step(self, pool: Pool) -> BatchedStep | None:
        """The CUDA library's, where the decoder's graph is a device graph."""
        return self._decoder.batched_step(pool) if self._decoder else None

    def _give(
        self, graph: GraphName, context: Any, inputs: Collection[str], tensors: Mapping[str, DeviceArray]
    ) -> None:
        """Gives a context addresses, and the shapes of the inputs."""
        engine = self._found[graph].path
        for name, memory in tensors.items():
            if name in inputs and not context.set_input_shape(name, memory.shape):
                built = _shown(self._engines[graph].get_tensor_shape(name))
                raise self._failed(f"{engine} takes {name} of {built}, not of {_shown(memory.shape)}")
            if not context.set_tensor_address(name, memory.address):
                raise self._failed(f"{engine} refuses the memory of {name}")

    def _record(self, run: Run) -> Run:
        """A CUDA graph of one run."""
        run()  # once before: TensorRT prepares itself for new shapes in ways that cannot be recorded
        self._stream.synchronize()
        recorded = self._stream.capture(run)
        return recorded.launch

    def _replay_context(self, graph: GraphName, profile: int) -> Any:
        """The context that recordings of a graph are made from: the next one ends the one before."""
        if graph not in self._replaying:
            self._replaying[graph] = self._context(graph, profile)
        return self._replaying[graph]

    def _load_all(self, bundle: Bundle) -> None:
        self._engines = {graph: self._load(bundle, graph) for graph in self._found}

    def _load(self, bundle: Bundle, graph: GraphName) -> Any:
        found = self._found[graph]
        if found.version_compatible:
            self._runtime.engine_host_code_allowed = True
        with found.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = self._runtime.deserialize_cuda_engine(data)  # mapped: no second copy in the host's memory
        if engine is None:
            raise self._failed(f"TensorRT cannot load {found.path}", f"build it again: {found.rebuild}")
        if found.stripped:
            self._refit(engine, found, bundle.engine_graph(graph))
        self._check_tensors(bundle, graph, engine)
        return engine

    def _refit(self, engine: Any, found: BuiltEngine, model: Path) -> None:
        """Gives an engine that was built without weights those of the bundle's graph."""
        refitter = self._trt.Refitter(engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not (parser.refit_from_file(str(model)) and refitter.refit_cuda_engine()):
            raise self._failed(f"{found.path} does not take the weights of {model}", f"build it again: {found.rebuild}")

    def _check_tensors(self, bundle: Bundle, graph: GraphName, engine: Any) -> None:
        plain, narrowed = bundle.manifest.graphs[graph], {"int64": ("int64", "int32")}
        spec = plain.device if plain.device and self._found[graph].form == "device" else plain
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        listed = {t.name: narrowed.get(t.dtype, (t.dtype,)) for t in (*spec.inputs, *spec.outputs)}
        if set(names) != set(listed) or any(
            _TYPES.get(engine.get_tensor_dtype(n).name) not in listed[n] for n in names
        ):
            found = self._found[graph]
            raise TangoError(
                f"the tensors of {found.path} are not those that bundle.json lists", f"build it: {found.rebuild}"
            )

    def _context(self, graph: GraphName, profile: int) -> Any:
        context = _new_context(self._trt, self._engines[graph])
        if context is None:
            raise self._failed(f"TensorRT cannot prepare {self._found[graph].path}", "free memory on the GPU")
        _give_scratch(context, self._scratch)
        if not context.set_optimization_profile_async(profile, self._stream.handle):
            raise self._failed(f"{self._found[graph].path} has no profile {profile}", self._found[graph].rebuild)
        self._stream.synchronize()
        return context

    def _failed(self, what: str, hint: str = "see: tango doctor BUNDLE") -> TangoError:
        errors = "; ".join(self._logger.errors)
        self._logger.errors.clear()
        return TangoError(f"{what}: {errors or 'TensorRT gives no reason'}", hint)


def _shown(shape: Iterable[int]) -> str:
    """``?x384x384x3``, where a length may vary."""
    return "x".join("?" if length < 0 else str(length) for length in shape)


@cache
def _logger(trt: Any) -> Any:
    """A logger that keeps the last errors for a message; TensorRT's warnings go nowhere.

    One for the process, for ever: TensorRT logs to the first that it was ever given.
    """

    class Log(trt.ILogger):  # type: ignore[misc]  # the module is Any
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # as its binding wants it
            self.errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

    return Log()


# What differs between the versions.


def _new_context(trt: Any, engine: Any) -> Any:
    """A context that is given its scratch memory."""
    if hasattr(trt, "ExecutionContextAllocationStrategy"):  # 10 on
        return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return engine.create_execution_context_without_device_memory()


def _scratch_bytes(engine: Any) -> int:
    """Bytes for the most demanding profile of an engine."""
    size: int = engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
    return size


def _give_scratch(context: Any, scratch: Buffer) -> None:
    if hasattr(context, "set_device_memory"):  # 10.1 on
        context.set_device_memory(scratch.address, scratch.size)
    else:
        context.device_memory = scratch.address
