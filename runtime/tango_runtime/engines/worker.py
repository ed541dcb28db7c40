"""Builds one engine in a process of its own: ``python -m tango_runtime.engines.worker``, which ``tango build`` starts.

A job comes in on standard input as JSON; progress goes out on standard output, one JSON object a line; TensorRT's log
goes to standard error. The process ends with 0 when the engine stands where the job says.

Written for the Python API of TensorRT 8.5 to 11, its names looked up in ``__members__`` where versions differ. They are
those of the package of 8.6.0 and the headers of 8.5.3, 8.6.1, 10.0.1, 10.3.0 and 11.1. It has built engines with 8.6.0.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tango_plugins import op
from tango_runtime.bundle import TensorSpec
from tango_runtime.engines import HARDWARE_LEVELS, Recipe
from tango_runtime.util.files import staged_file
from tango_runtime.util.jsonschema import from_json

_MIB = 1 << 20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

#: cuBLAS and cuDNN take memory, must be installed in the right version, and are off by default from TensorRT 10 on.
_FOREIGN_TACTICS = ("CUBLAS", "CUBLAS_LT", "CUDNN")

#: Layers that move no floating-point value through arithmetic of their own, or whose types are theirs to say.
_FREE_LAYERS = (
    *("CONSTANT", "CAST", "IDENTITY", "SHAPE", "FILL", "QUANTIZE", "DEQUANTIZE", "PLUGIN", "PLUGIN_V2", "PLUGIN_V3"),
    *("ASSERTION", "NON_ZERO"),
)

#: Layers that only move values, in whatever type these have. Told a precision of their own, TensorRT 8.6 finds no
#: implementation for the part of the graph that they are in; told the type of what they give, it does.
_MOVING_LAYERS = ("SHUFFLE", "SLICE", "CONCATENATION", "GATHER", "SELECT")


@dataclass(frozen=True)
class Job:
    """One engine to be built.

    Attributes:
        recipe: What it is made of.
        model: The graph's ONNX file.
        inputs: The graph's inputs.
        plugin: The TensorRT plugin, for prune only.
        output: Where the engine is written.
        timing_cache: What kernels took in earlier builds; read, and what was learnt is added.
        parent: Process that wants it; this one ends with it.
    """

    recipe: Recipe
    model: str
    inputs: tuple[TensorSpec, ...]
    plugin: str | None
    output: str
    timing_cache: str
    parent: int


class BuildError(Exception):
    """The engine cannot be built; TensorRT's log says more."""


def main() -> int:
    """Reads a job and does it."""
    tell = _protocol()
    job = from_json(Job, json.load(sys.stdin), "the job")
    _end_with(job.parent)
    try:
        _build(job, tell)
    except BuildError as error:
        tell({"error": str(error)})
        return 1
    tell({"peak_host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})
    return 0


def _build(job: Job, tell: Callable[[dict[str, Any]], None]) -> None:
    tell({"stage": "loading TensorRT"})
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # what the binding makes of a null pointer
        raise BuildError("TensorRT finds no GPU that it can use") from error
    library = _load_plugin(trt, job.plugin) if job.plugin else None
    network = builder.create_network(_network_flags(trt, job.recipe))
    tell({"stage": "reading the graph"})
    parser = _fill(trt, logger, network, job)
    if "OBEY_PRECISION_CONSTRAINTS" in job.recipe.flags:
        keep_float(trt, network)
    config = _configure(trt, builder, job)
    cache = _timing_cache(config, Path(job.timing_cache))
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, tell)
    tell({"stage": "choosing kernels"})
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError("TensorRT built no engine")
    tell({"stage": "writing"})
    Path(job.output).write_bytes(engine)
    _save_timing_cache(config, cache, Path(job.timing_cache))
    del parser, library  # the network's weights lay in the parser until here


# The network.


def _network_flags(trt: Any, recipe: Recipe) -> int:
    known = trt.NetworkDefinitionCreationFlag.__members__
    return sum(1 << int(known[name]) for name in recipe.flags if name in known)


def _fill(trt: Any, logger: Any, network: Any, job: Job) -> Any:
    """Gives the network its layers, and back what must live until it is built."""
    if job.recipe.graph == "prune":
        return _add_prune(trt, network, job)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.model):  # by path: the weights lie beside it
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BuildError(f"TensorRT cannot read {job.model}: {errors}")
    return parser


def _add_prune(trt: Any, network: Any, job: Job) -> list[Any]:
    types = {"float16": trt.DataType.HALF, "float32": trt.DataType.FLOAT}
    inputs = [
        network.add_input(t.name, types[t.dtype], tuple(n if isinstance(n, int) else -1 for n in t.shape))
        for t in job.inputs
    ]
    arrays, fields = plugin_fields(trt, job.recipe.attributes)
    where = (op.NAME, op.VERSION, op.DOMAIN)
    registry = trt.get_plugin_registry()
    new_api = hasattr(registry, "get_creator")  # TensorRT 10 on
    creator = registry.get_creator(*where) if new_api else registry.get_plugin_creator(*where)
    if creator is None:
        raise BuildError(f"{job.plugin} registers no plugin {op.NAME} {op.VERSION} in the namespace {op.DOMAIN}")
    if new_api:
        plugin = creator.create_plugin(op.NAME, fields, trt.TensorRTPhase.BUILD)
    else:
        plugin = creator.create_plugin(op.NAME, fields)
    if plugin is None:
        raise BuildError(f"the plugin {op.NAME} refuses its attributes")
    layer = network.add_plugin_v3(inputs, [], plugin) if new_api else network.add_plugin_v2(inputs, plugin)
    layer.name = op.NAME
    for i, name in enumerate(op.OUTPUTS):
        tensor = layer.get_output(i)
        tensor.name = name
        network.mark_output(tensor)
    tokens = layer.get_output(0)
    if tokens.dtype != inputs[0].dtype:  # a weakly typed network gives out fp32 unless it is told
        tokens.dtype = inputs[0].dtype
    return [arrays, fields, plugin]


def plugin_fields(trt: Any, attributes: dict[str, int | str | list[int]]) -> tuple[list[Any], Any]:
    """The operator's attributes as plugin fields.

    Returns:
        The arrays that the fields point into, to be kept as long as they, and the collection.
    """
    arrays, fields = [], []
    for name, value in attributes.items():
        if name.startswith("plugin_"):  # for the ONNX parser
            continue
        text = isinstance(value, str)
        array = np.frombuffer(value.encode(), np.int8) if isinstance(value, str) else np.array(value, np.int32).ravel()
        kind = trt.PluginFieldType.CHAR if text else trt.PluginFieldType.INT32
        arrays.append(array)
        fields.append(trt.PluginField(name, array, kind))
    return arrays, trt.PluginFieldCollection(fields)


def _load_plugin(trt: Any, path: str) -> Any:
    """Registers the plugin's creator; gives what must live as long as it is used."""
    registry = trt.get_plugin_registry()
    if hasattr(registry, "load_library"):  # TensorRT 8.6 on
        library = registry.load_library(path)
        if library is None:
            raise BuildError(f"TensorRT cannot load the plugin {path}")
        return library
    nvinfer, loaded = ctypes.CDLL("libnvinfer.so.8"), ctypes.CDLL(path)
    nvinfer.getPluginRegistry.restype = ctypes.c_void_p
    loaded.tango_register_plugins.argtypes, loaded.tango_register_plugins.restype = [ctypes.c_void_p], ctypes.c_bool
    if not loaded.tango_register_plugins(nvinfer.getPluginRegistry()):
        raise BuildError(f"TensorRT cannot register the plugin {path}")
    return loaded


def keep_float(trt: Any, network: Any) -> int:
    """Keeps in fp32 what the graph keeps in fp32, for a TensorRT that would otherwise take fp16 wherever it is faster.

    A weakly typed network forgets most of its types, so they are followed from the inputs, weights and casts on, in the
    order of the layers. Layers that the graph computes in fp16 are left free: more precision harms nothing. So are
    those whose operands were dequantised: they are what int8 is for.

    Returns:
        The number of layers that were told.
    """
    types = {t.name: t.dtype for t in (network.get_input(i) for i in range(network.num_inputs))}
    told, dequantized = 0, set()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = layer.type.name
        if kind == "DEQUANTIZE":
            dequantized.add(layer.get_output(0).name)
        computed = _computed_type(trt, layer, kind, types)
        for j in range(layer.num_outputs):
            tensor = layer.get_output(j)
            types[tensor.name] = computed if _is_float(trt, tensor.dtype) else tensor.dtype
        outputs = [j for j in range(layer.num_outputs) if types[layer.get_output(j).name] == trt.DataType.FLOAT]
        free = kind in _FREE_LAYERS or any(tensor.name in dequantized for tensor in _inputs(layer))
        if computed == trt.DataType.FLOAT and outputs and not free:
            if kind not in _MOVING_LAYERS:
                layer.precision = trt.DataType.FLOAT
            for j in outputs:
                layer.set_output_type(j, trt.DataType.FLOAT)
            told += 1
    return told


def _computed_type(trt: Any, layer: Any, kind: str, types: dict[str, Any]) -> Any:
    """The type that the graph computes a layer in: that of its first operand, as in ONNX."""
    if kind == "CONSTANT":
        layer.__class__ = trt.IConstantLayer
        names = {"float16": "HALF", "int32": "INT32", "bool": "BOOL"}
        return trt.DataType.__members__[names.get(np.asarray(layer.weights).dtype.name, "FLOAT")]
    if kind == "CAST":
        layer.__class__ = trt.ICastLayer
        return layer.to_type
    if kind == "DEQUANTIZE":
        return trt.DataType.FLOAT
    if kind == "IDENTITY" and layer.output_type_is_set(0):  # a cast of the ONNX parser before 8.6
        return layer.get_output_type(0)
    operands = [tensor for tensor in _inputs(layer) if kind != "SELECT" or tensor.name != layer.get_input(0).name]
    return types.get(operands[0].name, operands[0].dtype) if operands else trt.DataType.FLOAT


def _inputs(layer: Any) -> Iterator[Any]:
    for i in range(layer.num_inputs):
        tensor = layer.get_input(i)
        if tensor is not None:  # an input that is optional and left out
            yield tensor


def _is_float(trt: Any, dtype: Any) -> bool:
    return dtype in (trt.DataType.FLOAT, trt.DataType.HALF)


# How it is built.


def _configure(trt: Any, builder: Any, job: Job) -> Any:
    recipe, config = job.recipe, builder.create_builder_config()
    flags = trt.BuilderFlag.__members__
    config.clear_flag(flags["TF32"])  # on by default
    for name in recipe.flags:
        if name in flags:
            config.set_flag(flags[name])
        elif name not in trt.NetworkDefinitionCreationFlag.__members__ and name != "STRONGLY_TYPED":
            raise BuildError(f"TensorRT {trt.__version__} has no flag {name}")
    if recipe.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace * _MIB)
    if hasattr(config, "builder_optimization_level"):  # 8.6 on
        config.builder_optimization_level = recipe.optimization_level
    if recipe.hardware_compatibility != "none":
        level = trt.HardwareCompatibilityLevel.__members__[HARDWARE_LEVELS[recipe.hardware_compatibility]]
        config.hardware_compatibility_level = level
    if job.plugin and "VERSION_COMPATIBLE" in recipe.flags:
        config.plugins_to_serialize = [job.plugin]
    own = (member for name, member in trt.TacticSource.__members__.items() if name not in _FOREIGN_TACTICS)
    config.set_tactic_sources(sum(1 << int(source) for source in own))
    for ranges in recipe.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, typical, high) in ranges.items():
            profile.set_shape(name, low, typical, high)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT refuses the profile {ranges}")
    return config


def _timing_cache(config: Any, path: Path) -> Any:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):  # another GPU's, or cut
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(config: Any, cache: Any, path: Path) -> None:
    """Adds what was learnt to what others have written meanwhile."""
    with staged_file(path) as (partial, _):
        if path.is_file():
            others = config.create_timing_cache(path.read_bytes())
            if others is not None:
                cache.combine(others, ignore_mismatch=False)
        partial.write_bytes(cache.serialize())
        partial.rename(path)


# What is told.


def _protocol() -> Callable[[dict[str, Any]], None]:
    """Takes standard output for the protocol; what libraries print there goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    return tell


class Phases:
    """How far a build is, out of TensorRT's phases, which nest and may be told from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[str | None, int, int]] = {}  # parent, steps done, steps

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._open[phase] = (parent, 0, max(steps, 1))

    def step(self, phase: str, step: int) -> float:
        """A step of it is done, counted from 0; gives how far the outermost phase is, from 0 to 1."""
        with self._lock:
            parent, _, steps = self._open[phase]
            self._open[phase] = (parent, step + 1, steps)
            return self._inside(None)

    def finish(self, phase: str) -> None:
        """It is done."""
        with self._lock:
            self._open.pop(phase, None)

    def _inside(self, outer: str | None) -> float:
        """How far the furthest phase inside another is."""
        found = [
            min((done + self._inside(phase)) / steps, 1.0)
            for phase, (parent, done, steps) in self._open.items()
            if parent == outer
        ]
        return max(found, default=0.0)


def _monitor(trt: Any, tell: Callable[[dict[str, Any]], None]) -> Any:
    phases = Phases()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class of 10 and later
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase or None, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell({"fraction": phases.step(phase_name, step)})
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def _end_with(parent: int) -> None:
    """Lets the kernel end this process when the one that started it ends, in whatever way."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
