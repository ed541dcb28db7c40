"""A fake of TensorRT for machines without a GPU: the part of its Python API that the backend calls, on ONNX Runtime.

Engines are in the bundle with real sidecars; their content is the name of a graph and its form. Like TensorRT 8, it
does not let two contexts share a profile, takes int32 where the graph has int64, and needs tensors at multiples of 256
bytes.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import asdict
from enum import Enum

import numpy as np

from tango_plugins.device_array import DeviceArray
from tango_runtime import engines
from tango_runtime.backends.cuda import tensorrt
from tango_runtime.bundle import Bundle, sha256
from tango_runtime.engines import BuildOptions, Sidecar, Target
from tests.fakes.cuda import array

MACHINE = Target("8.6.0", "9.0", "NVIDIA Test", "1")


def open_backend(bundle, host, monkeypatch, trt=None):
    """The TensorRT backend of a bundle with engines, on the fake of TensorRT and a `HostCuda`."""
    trt = trt or HostTensorRT(bundle, host)
    monkeypatch.setattr(tensorrt, "import_tensorrt", lambda: trt)
    monkeypatch.setattr(tensorrt, "current_target", lambda version: MACHINE)
    return tensorrt.open_backend(bundle)


def build(folder, graphs=(), **options):
    """Writes engines into a bundle's folder, by default of all graphs but prune."""
    bundle = Bundle.load(folder)
    graphs = graphs or [graph for graph in engines.all_graphs(bundle) if graph != "prune"]
    planned = engines.plan_engines(bundle, MACHINE, BuildOptions(**options), graphs)
    for engine in planned:
        engine.path.parent.mkdir(exist_ok=True)
        engine.path.write_text(f"{engine.graph} {engine.spec.form}")
        size, digest = engine.path.stat().st_size, sha256(engine.path)
        sidecar = Sidecar(engines.FORMAT, engine.spec, MACHINE.gpu, size, digest, seconds=1.0, peak_host=1)
        engine.path.with_suffix(".json").write_text(json.dumps(asdict(sidecar)))
    return {engine.graph: engine.path for engine in planned}


class DataType(Enum):
    FLOAT, HALF, INT32, UINT8 = range(4)


_TYPES = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32", "int64": "INT32", "uint8": "UINT8"}


class HostTensorRT:
    """The module.

    Args:
        bundle: The bundle whose engines it runs.
        cuda: The emulated CUDA.
    """

    __version__ = MACHINE.tensorrt

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

        def __init__(self):
            pass

    def __init__(self, bundle, cuda):
        self.bundle, self.cuda, self.replays, self.libraries = bundle, cuda, 0, []
        self.first_logger = None

    def get_plugin_registry(self):
        return self

    def load_library(self, path):
        self.libraries.append(path)
        return path

    def log(self, severity, message):
        """Logs as TensorRT does: to the first logger that it was ever given, which must still be there."""
        logger = self.first_logger()
        assert logger is not None, "TensorRT would read freed memory"
        logger.log(severity, message)

    def Runtime(self, logger):  # noqa: N802
        outer = self
        self.first_logger = self.first_logger or weakref.ref(logger)

        class Runtime:
            def deserialize_cuda_engine(self, data):
                name, _, form = bytes(data).decode().partition(" ")
                if name not in outer.bundle.manifest.graphs:
                    outer.log(logger.ERROR, "magic tag does not match")
                    return None
                if form == "device" and not outer.libraries:
                    outer.log(logger.ERROR, "getPluginCreator could not find plugin")
                    return None
                return Engine(outer, name, form)

        return Runtime()


class Engine:
    device_memory_size = 1 << 16

    def __init__(self, trt, graph, form):
        from tango_runtime.backends.ort_cpu import open_session

        plain = trt.bundle.manifest.graphs[graph]
        self.trt, self.spec = trt, plain.device if form == "device" else plain
        self.session, self.profiles = open_session(trt.bundle.path / self.spec.file), set()
        self.tensors = {t.name: t for t in (*self.spec.inputs, *self.spec.outputs)}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, i):
        return list(self.tensors)[i]

    def get_tensor_shape(self, name):
        return tuple(n if isinstance(n, int) else -1 for n in self.tensors[name].shape)

    def get_tensor_dtype(self, name):
        return DataType[_TYPES[self.tensors[name].dtype]]

    def create_execution_context_without_device_memory(self):
        return Context(self)


class Context:
    device_memory = None

    def __init__(self, engine):
        self.engine, self.addresses = engine, {}
        self.shapes = {tensor.name: tensor.shape for tensor in engine.spec.inputs}

    def set_optimization_profile_async(self, profile, stream):
        free = profile not in self.engine.profiles
        self.engine.profiles.add(profile)
        return free

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        fixed = self.engine.get_tensor_shape(name)
        return len(shape) == len(fixed) and all(n in (-1, m) for n, m in zip(fixed, shape, strict=True))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, stream):
        assert self.device_memory is not None
        cuda, shapes, addresses = self.engine.trt.cuda, dict(self.shapes), dict(self.addresses)
        recorded = cuda.recording is not None
        cuda.do(lambda: self.run(shapes, addresses, recorded))
        return True

    def run(self, shapes, addresses, recorded):
        self.engine.trt.replays += recorded
        spec = self.engine.spec
        for name in addresses:
            if name.startswith("past_") and spec.file.endswith(".device.onnx"):
                assert addresses[name.replace("past", "present")] == addresses[name], "no plugin copies the cache"
        taken = {"int64": "int32"}
        feeds = {
            t.name: array(DeviceArray(addresses[t.name], shapes[t.name], taken.get(t.dtype, t.dtype))).astype(t.dtype)
            for t in spec.inputs
        }
        for tensor, found in zip(spec.outputs, self.engine.session.run(None, feeds), strict=True):
            array(DeviceArray(addresses[tensor.name], found.shape, np.dtype(found.dtype).name))[...] = found
