"""The library's operators as graphs of one node, with inputs for them."""

from __future__ import annotations

import numpy as np
import onnxruntime
from onnx import helper

from tango_export.graph.operators import FP8_FUNCTIONS, FP8_OPSET, FUNCTIONS

RNG = np.random.default_rng(0)
EPSILON = {"epsilon": 1e-5}
HALF, FLOAT = np.float16, np.float32
#: Those whose tensors are rows and what belongs to a row.
ACTIVATIONS = ("Bias", "BiasGelu", "BiasFastGelu", "SwiGLU", "BiasSwiGLU")
ROWS = (*ACTIVATIONS, "LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm")


def random(dtype, *shape):
    return RNG.normal(size=shape).astype(dtype)


def open_graph(op, inputs, outputs, library=None, profile=None, interleaved=False, **attributes):
    """A session of a graph with the operator alone; without the library it runs the operator's ONNX function.

    The graph has the opset of FP8 where a tensor is FP8.

    Args:
        op: The operator.
        inputs: Arrays by name, in order.
        outputs: A dtype and a number of axes by name, in order.
        library: The library that has the operator.
        profile: Folder for a profile of the run.
        interleaved: Whether weights in blocks are.
        attributes: The operator's.
    """

    def value_info(name, dtype, axes):
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [None] * axes)

    node = helper.make_node(op, list(inputs), list(outputs), "node", domain="tango", **attributes)
    taken = [value_info(name, array.dtype, array.ndim) for name, array in inputs.items()]
    graph = helper.make_graph([node], "graph", taken, [value_info(name, *kind) for name, kind in outputs.items()])
    is_fp8 = op not in FUNCTIONS
    opsets = [helper.make_opsetid(domain, n) for domain, n in (("", FP8_OPSET if is_fp8 else 17), ("tango", 1))]
    function = FP8_FUNCTIONS[op] if is_fp8 else FUNCTIONS[op]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9 if is_fp8 else 8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile / "profile")
    if interleaved:
        options.add_session_config_entry("tango.interleaved", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def example(op, dtype, shape, stream=None):
    """Inputs, outputs and attributes of an operator of rows: x [*shape], and what belongs to it."""
    width, stream = shape[-1], stream or dtype
    x, row, outputs = random(dtype, *shape), random(dtype, width), {"y": (dtype, len(shape))}
    gains = {name: random(FLOAT, width) for name in ("weight", "beta")[: 2 if op.endswith("LayerNorm") else 1]}
    if op == "BiasSwiGLU":
        gate, up = {"gate": x, "gate_bias": row}, {"up": random(dtype, *shape), "up_bias": random(dtype, width)}
        return gate | up, outputs, {"scale": 0.125}
    if op == "SwiGLU":
        return {"gate": x, "up": random(dtype, *shape)}, outputs, {}
    if "Norm" not in op:
        return {"x": x, "bias": row}, outputs, {}
    if not op.startswith("Add"):
        return {"x": x, **gains}, outputs, EPSILON
    branch = {"branch": x} | ({"bias": row} if op == "AddLayerNorm" else {})
    return {"residual": random(stream, *shape), **branch, **gains}, outputs | {"sum": (stream, len(shape))}, EPSILON


def wide_norm(shape, branch=None, bias=None):
    """As :func:`example`, for the norm of an fp32 stream: alone, or after a branch with a bias, which may be fp32."""
    stream, weight = random(FLOAT, *shape), {"weight": random(FLOAT, shape[-1])}
    y = {"y": (HALF, len(shape))}
    if branch is None:
        return "WideRMSNorm", {"wide": stream, **weight}, y, EPSILON
    loud = 1e5 if bias is FLOAT else 1
    added = {"branch": random(branch, *shape), "bias": (loud * random(FLOAT, shape[-1])).astype(bias)}
    outputs = y | {"sum": (FLOAT, len(shape))}
    return "AddWideRMSNorm", {"residual": stream, **added, **weight}, outputs, EPSILON | {"scale": 256.0}


def linear(op, shape, outputs):
    """Inputs and outputs of a product of fp16 matrices, x [*shape]."""
    weight = (random(FLOAT, shape[-1], outputs) * shape[-1] ** -0.5).astype(HALF)
    inputs = {"x": random(HALF, *shape), "weight": weight}
    bias = {"bias": random(HALF, outputs)} if op == "LinearGelu" else {}
    return inputs | bias, {"y": (HALF, len(shape))}


def rotation(frames, tokens, heads, head_dim):
    """Inputs of a rotation of patches."""
    angles, width = random(FLOAT, tokens, head_dim // 2), heads * head_dim
    packed = {"qkv": random(HALF, frames, tokens, 3 * width), "bias": random(HALF, 3 * width)}
    return packed | {"cosines": np.cos(angles), "sines": np.sin(angles)}


def windows(frames, rows, columns, heads, head_dim):
    """Inputs of attention in windows: as of a rotation, with the grid's axes."""
    inputs = rotation(frames, rows * columns, heads, head_dim)
    return inputs | {"qkv": inputs["qkv"].reshape(frames, rows, columns, -1)}


def rotated(frames, tokens, heads, head_dim):
    """Inputs of attention in frames."""
    width = heads * head_dim
    parts = {name: random(HALF, frames, tokens, width) for name in ("query", "key")}
    return parts | {"qkv": random(HALF, frames, tokens, 3 * width), "bias": random(HALF, 3 * width)}


def pixels(frames, steps, rows, columns):
    """Inputs of patches."""
    given = RNG.integers(0, 256, (frames, steps, rows, columns, 3), dtype=np.uint8)
    return {"pixels": given, "mean": random(FLOAT, 3), "deviation": np.abs(random(FLOAT, 3)) + FLOAT(0.1)}
