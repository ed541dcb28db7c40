"""A fake of TensorRT 8.6: the part of its Python API that `tango_runtime.engines.worker` calls.

It checks its arguments where the real one is known to, and writes an "engine" that lists them. The file ``behavior`` in
the bundle's folder selects how a build goes: ``fail``, ``hang``, ``die``, ``empty``, or ``wait`` until there is a file
``go``.
"""

import enum
import json
import os
import signal
import sys
import time
from pathlib import Path

__version__ = "8.6.0"

BuilderFlag = enum.Enum(
    "BuilderFlag", "FP16 INT8 TF32 REFIT OBEY_PRECISION_CONSTRAINTS VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME", start=0
)
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH", start=0)
MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS")
TacticSource = enum.IntEnum("TacticSource", "CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS", start=0)
DataType = enum.Enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8")
PluginFieldType = enum.Enum("PluginFieldType", "INT32 CHAR")
LayerType = enum.Enum(
    "LayerType", "CONSTANT CAST IDENTITY MATRIX_MULTIPLY SOFTMAX ELEMENTWISE SELECT QUANTIZE DEQUANTIZE"
)


class Registry:
    def load_library(self, path):
        return path if Path(path).is_file() else None


def get_plugin_registry():
    return Registry()


class Logger:
    WARNING = 1

    def __init__(self, severity):
        assert severity == self.WARNING


class Tensor:
    def __init__(self, name, dtype):
        self.name, self.dtype = name, dtype


class Layer:
    def __init__(self, type, inputs, outputs):
        self.type, self.inputs, self.outputs = type, inputs, outputs
        self.precision, self.set = None, {}

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, i):
        return self.inputs[i]

    def get_output(self, i):
        return self.outputs[i]

    def output_type_is_set(self, i):
        return i in self.set

    def get_output_type(self, i):
        return self.set.get(i, self.outputs[i].dtype)

    def set_output_type(self, i, dtype):
        self.set[i] = dtype


class IConstantLayer(Layer):
    pass


class ICastLayer(Layer):
    pass


class Network:
    def __init__(self):
        self.inputs, self.layers, self.model, self.bytes = [], [], None, None

    num_inputs = property(lambda self: len(self.inputs))
    num_layers = property(lambda self: len(self.layers))

    def get_input(self, i):
        return self.inputs[i]

    def get_layer(self, i):
        return self.layers[i]


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self.network = network

    def get_error(self, i):
        return "no such operator"

    def parse_from_file(self, path):
        self.network.model = path
        return Path(path).stat().st_size > 0

    def parse(self, model):
        self.network.bytes = len(model)
        return True


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, low, typical, high):
        assert all(0 <= a <= b <= c for a, b, c in zip(low, typical, high, strict=True))
        self.shapes[name] = [low, typical, high]


class TimingCache:
    def __init__(self, data):
        self.entries = set(data.split())

    def combine(self, other, ignore_mismatch):
        assert not ignore_mismatch
        self.entries |= other.entries
        return True

    def serialize(self):
        return b"\n".join(sorted(self.entries))


class Config:
    def __init__(self):
        self.flags, self.profiles, self.limits = {"TF32"}, [], {}

    def set_flag(self, flag):
        self.flags.add(flag.name)

    def clear_flag(self, flag):
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool, size):
        self.limits[pool.name] = size

    def set_tactic_sources(self, mask):
        assert not mask & (1 << TacticSource.CUBLAS | 1 << TacticSource.CUBLAS_LT | 1 << TacticSource.CUDNN)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, data):
        return TimingCache(data)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return b"another-gpu" not in cache.entries


class Builder:
    def __init__(self, logger):
        pass

    def create_network(self, flags):
        assert flags == 1 << NetworkDefinitionCreationFlag.EXPLICIT_BATCH
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        print("TensorRT prints where it likes")
        content = {"flags": sorted(config.flags), "profiles": config.profiles, **config.limits}
        if network.model is None:
            return json.dumps({**content, "bytes": network.bytes}).encode()
        folder = Path(network.model).parent
        behavior = folder / "behavior"
        how = behavior.read_text() if behavior.is_file() else ""
        (folder / "began").write_text(str(os.getpid()))
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while how == "hang" or (how == "wait" and not (folder / "go").is_file()):
            time.sleep(0.01)
        if how == "fail":
            print("[TRT] [E] 10: no implementation for node MatMul_7", file=sys.stderr)
            return None
        with (folder / "builds").open("a") as builds:
            builds.write(f"{Path(network.model).stem}\n")
        config.cache.entries.add(Path(network.model).stem.encode())
        return b"" if how == "empty" else json.dumps(content).encode()
