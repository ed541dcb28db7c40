"""Builds one engine in its own process: ``python -m tango_runtime.engines.worker``, started by ``tango build``.

It reads a job from standard input as JSON, writes progress to standard output as one JSON object per line, and leaves
standard error to TensorRT's log. It exits with 0 when the engine is at the job's output path.
docs/design/engine-builds.md describes the protocol and the precision constraints.

It uses the Python API of TensorRT 8.5 to 11 and looks names up in ``__members__`` where versions differ. The names come
from the package of 8.6.0 and the headers of 8.5.3, 8.6.1, 10.0.1, 10.3.0 and 11.1. Engines of 8.6.0 have run.
TensorRT-RTX, which has the API of 11, builds engines in every test run; 10 and 11 themselves have not been tried.
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

from tango_plugins import TangoError, op
from tango_runtime.bundle import TensorSpec
from tango_runtime.engines import HARDWARE_LEVELS, EngineSpec
from tango_runtime.engines.functions import without_functions
from tango_runtime.engines.plugins import load_plugins
from tango_runtime.util.files import staged_file
from tango_runtime.util.jsonschema import from_json

_MIB = 1 << 20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

#: cuBLAS and cuDNN take memory and need matching versions. From TensorRT 10 on they are off by default.
_FOREIGN_TACTICS = ("CUBLAS", "CUBLAS_LT", "CUDNN")

#: Lets a plugin give an output the memory of an input, as attention does with a cache that grows in place.
_IN_PLACE = "ALIASED_PLUGIN_IO_10_03"

#: Layers without floating-point arithmetic, or with types that are fixed by the layer.
_FREE_LAYERS = (
    *("CONSTANT", "CAST", "IDENTITY", "SHAPE", "FILL", "QUANTIZE", "DEQUANTIZE", "PLUGIN", "PLUGIN_V2", "PLUGIN_V3"),
    *("ASSERTION", "NON_ZERO"),
)

#: Layers that only move values, of any type. With a precision set on them, TensorRT 8.6 finds no implementation for
#: their part of the graph. With only their output type set, it finds one.
_MOVING_LAYERS = ("SHUFFLE", "SLICE", "CONCATENATION", "GATHER", "SELECT")


@dataclass(frozen=True)
class Job:
    """One engine to build.

    Attributes:
        spec: What to build it from.
        model: Path of the graph's ONNX file.
        inputs: The graph's inputs.
        plugin: Path of the library of plugins; None where the engine has none.
        output: Path of the engine.
        timing_cache: Path of the measured kernel times of earlier builds; the build reads it and adds its own.
        parent: Id of the process that started this one, which ends when that process ends.
    """

    spec: EngineSpec
    model: str
    inputs: tuple[TensorSpec, ...]
    plugin: str | None
    output: str
    timing_cache: str
    parent: int


class BuildError(Exception):
    """The engine cannot be built; TensorRT's log has details."""


def main() -> int:
    """Reads a job and runs it."""
    send = _open_protocol()
    job = from_json(Job, json.load(sys.stdin), "the job")
    _end_with(job.parent)
    try:
        _build(job, send)
    except BuildError as error:
        send({"error": str(error)})
        return 1
    except TangoError as error:
        send({"error": error.message})
        return 1
    send({"peak_host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})
    return 0


def _build(job: Job, send: Callable[[dict[str, Any]], None]) -> None:
    send({"stage": "loading TensorRT"})
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # the binding raises it for a null pointer
        raise BuildError("TensorRT finds no usable GPU") from error
    if job.plugin:
        load_plugins(trt, Path(job.plugin))
    network = builder.create_network(_network_flags(trt, job.spec))
    send({"stage": "reading the graph"})
    parser = _fill(trt, logger, network, job)
    if "OBEY_PRECISION_CONSTRAINTS" in job.spec.flags:
        keep_float(trt, network)
    config = _configure(trt, builder, job)
    cache = _timing_cache(config, Path(job.timing_cache))
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, send)
    send({"stage": "choosing kernels"})
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError("TensorRT built no engine")
    send({"stage": "writing"})
    Path(job.output).write_bytes(engine)
    _save_timing_cache(config, cache, Path(job.timing_cache))
    del parser  # it owns the network's weights


# The network.


def _network_flags(trt: Any, spec: EngineSpec) -> int:
    known = trt.NetworkDefinitionCreationFlag.__members__
    return sum(1 << int(known[name]) for name in spec.flags if name in known)


def _fill(trt: Any, logger: Any, network: Any, job: Job) -> Any:
    """Adds the layers to the network; returns the object that must outlive the build."""
    if job.spec.graph == "prune":
        return _add_prune(trt, network, job)
    parser = trt.OnnxParser(network, logger)
    if not _parse(parser, job):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BuildError(f"TensorRT cannot read {job.model}: {errors}")
    return parser


def _parse(parser: Any, job: Job) -> bool:
    if job.spec.form == "portable":
        return bool(parser.parse_from_file(job.model))  # by path: the weights are in a file beside it
    try:
        return bool(parser.parse(without_functions(Path(job.model).read_bytes())))
    except ValueError as error:
        raise BuildError(f"{job.model} is no ONNX file: {error}") from error


def _add_prune(trt: Any, network: Any, job: Job) -> list[Any]:
    types = {"float16": trt.DataType.HALF, "float32": trt.DataType.FLOAT}
    inputs = [
        network.add_input(t.name, types[t.dtype], tuple(n if isinstance(n, int) else -1 for n in t.shape))
        for t in job.inputs
    ]
    arrays, fields = plugin_fields(trt, job.spec.attributes)
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
        raise BuildError(f"the plugin {op.NAME} rejects its attributes")
    layer = network.add_plugin_v3(inputs, [], plugin) if new_api else network.add_plugin_v2(inputs, plugin)
    layer.name = op.NAME
    for i, name in enumerate(op.OUTPUTS):
        tensor = layer.get_output(i)
        tensor.name = name
        network.mark_output(tensor)
    tokens = layer.get_output(0)
    if tokens.dtype != inputs[0].dtype:  # a weakly typed network outputs fp32 by default
        tokens.dtype = inputs[0].dtype
    return [arrays, fields, plugin]


def plugin_fields(trt: Any, attributes: dict[str, int | str | list[int]]) -> tuple[list[Any], Any]:
    """The operator's attributes as plugin fields.

    Returns:
        The arrays that the fields point into, which must live as long as the fields, and the collection.
    """
    arrays, fields = [], []
    for name, value in attributes.items():
        if name.startswith("plugin_"):  # only for the ONNX parser
            continue
        text = isinstance(value, str)
        array = np.frombuffer(value.encode(), np.int8) if isinstance(value, str) else np.array(value, np.int32).ravel()
        kind = trt.PluginFieldType.CHAR if text else trt.PluginFieldType.INT32
        arrays.append(array)
        fields.append(trt.PluginField(name, array, kind))
    return arrays, trt.PluginFieldCollection(fields)


def keep_float(trt: Any, network: Any) -> int:
    """Constrains to fp32 the layers that the graph computes in fp32; TensorRT would otherwise choose the fastest type.

    A weakly typed network loses most types, so this derives them from inputs, weights and casts, in layer order. Layers
    in fp16 stay unconstrained, because more precision does no harm. So do layers with dequantized operands, which are
    meant for int8.

    Returns:
        The number of constrained layers.
    """
    types = {t.name: t.dtype for t in (network.get_input(i) for i in range(network.num_inputs))}
    constrained, dequantized = 0, set()
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
            constrained += 1
    return constrained


def _computed_type(trt: Any, layer: Any, kind: str, types: dict[str, Any]) -> Any:
    """The type that the graph computes a layer in: the type of its first operand, as in ONNX."""
    if kind == "CONSTANT":
        layer.__class__ = trt.IConstantLayer
        names = {"float16": "HALF", "int32": "INT32", "bool": "BOOL"}
        return trt.DataType.__members__[names.get(np.asarray(layer.weights).dtype.name, "FLOAT")]
    if kind == "CAST":
        layer.__class__ = trt.ICastLayer
        return layer.to_type
    if kind == "DEQUANTIZE":
        return trt.DataType.FLOAT
    if kind == "IDENTITY" and layer.output_type_is_set(0):  # how the ONNX parser before 8.6 casts
        return layer.get_output_type(0)
    operands = [tensor for tensor in _inputs(layer) if kind != "SELECT" or tensor.name != layer.get_input(0).name]
    return types.get(operands[0].name, operands[0].dtype) if operands else trt.DataType.FLOAT


def _inputs(layer: Any) -> Iterator[Any]:
    for i in range(layer.num_inputs):
        tensor = layer.get_input(i)
        if tensor is not None:  # an optional input that is absent
            yield tensor


def _is_float(trt: Any, dtype: Any) -> bool:
    return dtype in (trt.DataType.FLOAT, trt.DataType.HALF)


# The builder.


def _configure(trt: Any, builder: Any, job: Job) -> Any:
    spec, config = job.spec, builder.create_builder_config()
    flags = trt.BuilderFlag.__members__
    config.clear_flag(flags["TF32"])  # on by default
    for name in spec.flags:
        if name in flags:
            config.set_flag(flags[name])
        elif name not in trt.NetworkDefinitionCreationFlag.__members__ and name != "STRONGLY_TYPED":
            raise BuildError(f"TensorRT {trt.__version__} has no flag {name}")
    if spec.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace * _MIB)
    if hasattr(config, "builder_optimization_level"):  # 8.6 on
        config.builder_optimization_level = spec.optimization_level
    if spec.hardware_compatibility != "none":
        level = trt.HardwareCompatibilityLevel.__members__[HARDWARE_LEVELS[spec.hardware_compatibility]]
        config.hardware_compatibility_level = level
    preview = getattr(trt, "PreviewFeature", None)
    if spec.form == "device" and preview is not None and _IN_PLACE in preview.__members__:  # 10.3 on
        config.set_preview_feature(preview.__members__[_IN_PLACE], True)
    if job.plugin and "VERSION_COMPATIBLE" in spec.flags:
        config.plugins_to_serialize = [job.plugin]
    own = (member for name, member in trt.TacticSource.__members__.items() if name not in _FOREIGN_TACTICS)
    config.set_tactic_sources(sum(1 << int(source) for source in own))
    for ranges in spec.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, typical, high) in ranges.items():
            profile.set_shape(name, low, typical, high)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT rejects the profile {ranges}")
    return config


def _timing_cache(config: Any, path: Path) -> Any:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):  # from another GPU, or truncated
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(config: Any, cache: Any, path: Path) -> None:
    """Adds this build's times to those that other builds have written meanwhile."""
    with staged_file(path) as (partial, _):
        if path.is_file():
            others = config.create_timing_cache(path.read_bytes())
            if others is not None:
                cache.combine(others, ignore_mismatch=False)
        partial.write_bytes(cache.serialize())
        partial.rename(path)


# Progress.


def _open_protocol() -> Callable[[dict[str, Any]], None]:
    """Reserves standard output for messages; the output of libraries goes to standard error instead."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    return send


class Phases:
    """Progress of a build, from TensorRT's phases, which nest and may report from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[str | None, int, int]] = {}  # parent, steps done, steps

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Opens a phase."""
        with self._lock:
            self._open[phase] = (parent, 0, max(steps, 1))

    def step(self, phase: str, step: int) -> float:
        """Completes a step of a phase, counted from 0; returns the progress of the whole build, from 0 to 1."""
        with self._lock:
            parent, _, steps = self._open[phase]
            self._open[phase] = (parent, step + 1, steps)
            return self._progress(None)

    def finish(self, phase: str) -> None:
        """Closes a phase."""
        with self._lock:
            self._open.pop(phase, None)

    def _progress(self, outer: str | None) -> float:
        """Progress of the furthest phase inside another one."""
        fractions = [
            min((done + self._progress(phase)) / steps, 1.0)
            for phase, (parent, done, steps) in self._open.items()
            if parent == outer
        ]
        return max(fractions, default=0.0)


def _monitor(trt: Any, send: Callable[[dict[str, Any]], None]) -> Any:
    phases = Phases()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # exists from 10 on
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase or None, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            send({"fraction": phases.step(phase_name, step)})
            return True  # continue

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def _end_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has already ended
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
