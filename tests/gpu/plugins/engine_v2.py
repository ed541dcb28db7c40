"""The plugin in an engine: prune.onnx → parser → engine gives the same result as a direct call of the library.

    python tests/gpu/plugins/engine_v2.py libtango_tensorrt.so libtango.so

For TensorRT 8.6 and later with its builder; needs onnx and cuda-bindings, and neither pytest nor PyTorch.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import onnx
import tensorrt as trt
from cuda.bindings import runtime as cudart

from tango_plugins import PruneParams, op
from tango_plugins.device_array import DeviceArray
from tango_plugins.pruner import CudaPruner

GRID, D = (14, 14), 256
L = GRID[0] * GRID[1]

#: The engine is built for 1 to MAX_FRAMES frames. Above 32, inner products of a segment of this video come in strips. A
#: shorter video must work with the workspace of the longest one.
MAX_FRAMES, FRAMES = 64, (64, 40, 33, 32, 12, 1)
ONNX_TYPES = {"features": onnx.TensorProto.FLOAT16}


def graph(params: PruneParams) -> bytes:
    """prune.onnx as export makes it, without its functions and for any number of frames."""
    shapes = {"features": ["frames", L, D], "salience": ["frames", L], "timestamps": ["frames"]}
    inputs = [
        onnx.helper.make_tensor_value_info(name, ONNX_TYPES.get(name, onnx.TensorProto.FLOAT), shapes[name])
        for name in op.INPUTS
    ]
    outputs = [
        onnx.helper.make_tensor_value_info("tokens", onnx.TensorProto.FLOAT16, ["capacity", D]),
        onnx.helper.make_tensor_value_info("indices", onnx.TensorProto.INT32, ["capacity"]),
        onnx.helper.make_tensor_value_info("count", onnx.TensorProto.INT32, []),
    ]
    node = onnx.helper.make_node(op.NAME, list(op.INPUTS), list(op.OUTPUTS), name=op.NAME, domain=op.DOMAIN)
    for name, value in op.node_attributes(params).items():  # typed, so that an empty list of sinks stays a list
        kind = {int: onnx.AttributeProto.INT, str: onnx.AttributeProto.STRING, list: onnx.AttributeProto.INTS}[
            type(value)
        ]
        node.attribute.append(onnx.helper.make_attribute(name, value, attr_type=kind))
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(op.DOMAIN, 1)]
    made = onnx.helper.make_graph([node], "prune", inputs, outputs)
    return onnx.helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()


def build(logger: trt.Logger, model: bytes) -> bytes:
    """A serialized engine for 1 to ``MAX_FRAMES`` frames."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        sys.exit("\n".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_tactic_sources(0)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    profile = builder.create_optimization_profile()
    for name, rest in (("features", (L, D)), ("salience", (L,)), ("timestamps", ())):
        profile.set_shape(name, (1, *rest), (12, *rest), (MAX_FRAMES, *rest))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        sys.exit("no engine was built")
    return bytes(engine)


def allocate(array: np.ndarray) -> DeviceArray:
    """Device memory with the contents of an array."""
    error, pointer = cudart.cudaMalloc(max(array.nbytes, 1))
    assert int(error) == 0, error
    copied = cudart.cudaMemcpy(pointer, array.ctypes.data, array.nbytes, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)
    assert int(copied[0]) == 0, copied
    return DeviceArray(int(pointer), array.shape, str(array.dtype))


def read(memory: DeviceArray) -> np.ndarray:
    """The contents of device memory."""
    array = np.empty(memory.shape, memory.dtype)
    to_host = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
    (error,) = cudart.cudaMemcpy(array.ctypes.data, memory.address, array.nbytes, to_host)
    assert int(error) == 0, error
    return array


def video(F: int) -> dict[str, np.ndarray]:
    """Inputs of F frames by name."""
    rng = np.random.default_rng(F)
    X = rng.standard_normal((L, D)) + 0.6 * rng.standard_normal((F, L, D))
    return {
        "features": X.astype(np.float16),
        "salience": rng.random((F, L), np.float32),
        "timestamps": 0.5 * np.arange(F, dtype=np.float32),
    }


def compare(context: trt.IExecutionContext, params: PruneParams, F: int, core: Path) -> int:
    """Runs a video of F frames in the engine and in the library; exits if a bit differs.

    Returns:
        The number of tokens kept.
    """
    inputs = {name: allocate(array) for name, array in video(F).items()}
    pruner = CudaPruner(params, F, D, library=core)
    K = pruner.capacity
    poison = {
        "tokens": np.full((K, D), 7, np.float16),
        "indices": np.full(K, 7, np.int32),
        "count": np.full(1, 7, np.int32),
    }
    engines, library = ({name: allocate(array) for name, array in poison.items()} for _ in range(2))
    for name, memory in inputs.items():
        assert context.set_input_shape(name, memory.shape), name
    for name, memory in {**inputs, **engines}.items():
        assert context.set_tensor_address(name, memory.address), name
    assert context.execute_async_v3(0)
    workspace = allocate(np.zeros(pruner.workspace_bytes, np.uint8))
    pruner.enqueue(*inputs.values(), **library, workspace=workspace)
    assert int(cudart.cudaDeviceSynchronize()[0]) == 0
    for name in op.OUTPUTS:
        if (read(engines[name]) != read(library[name])).any():
            sys.exit(f"{name} of {F} frames differs between the engine and the library")
    kept = int(read(engines["count"])[0])
    for memory in (*inputs.values(), *engines.values(), *library.values(), workspace):
        assert int(cudart.cudaFree(memory.address)[0]) == 0
    return kept


def main() -> None:
    """Builds, runs and compares; exits with 1 and a message if something differs."""
    plugin, core = (Path(argument).resolve() for argument in sys.argv[1:3])
    logger = trt.Logger(trt.Logger.INFO)
    registry = trt.get_plugin_registry()
    handle = registry.load_library(str(plugin)) if hasattr(registry, "load_library") else ctypes.CDLL(str(plugin))
    assert handle is not None
    no_sinks = PruneParams(grid=GRID, retention_ratio=0.2, budget="exact", sink_positions=())
    for params in (PruneParams(grid=GRID), no_sinks):
        engine = trt.Runtime(logger).deserialize_cuda_engine(build(logger, graph(params)))
        context = engine.create_execution_context()
        for F in FRAMES:
            kept = compare(context, params, F, core)
            print(f"TensorRT {trt.__version__}, {params.budget}: {kept} of {F * L} tokens, the same as the library's")


if __name__ == "__main__":
    main()
