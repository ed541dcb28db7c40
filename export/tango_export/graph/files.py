"""The files of a graph: ONNX, its weights beside it in one external data file, and its entry in bundle.json."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from tango_export.graph import device
from tango_export.graph.builder import Array, Graph, Read, Weight
from tango_export.graph.forms import PORTABLE
from tango_export.graph.fused import fused_gelus
from tango_export.graph.prune_function import prune_functions
from tango_plugins import PruneParams, TangoError, op
from tango_runtime.bundle import WEIGHT_ALIGNMENT, GraphSpec, Runtime, TensorSpec, WeightSpec
from tango_runtime.util.console import OnProgress

#: Rows that are converted at once: their transposed copy fits the processor's cache.
_ROWS = 128


def write_portable(graph: Graph, read: Read, folder: Path, on_progress: OnProgress) -> GraphSpec:
    """Writes a graph and its external data, weight by weight.

    Args:
        graph: The graph in its portable form.
        read: Reads a tensor of the checkpoint.
        folder: Where to write.
        on_progress: Called with the bytes of each weight written.

    Raises:
        TangoError: A weight is damaged, or its dtype does not hold its values.
    """
    runtimes: tuple[Runtime, ...] = ("onnxruntime", "tensorrt")
    spec = GraphSpec(f"{graph.name}.onnx", graph.form.opsets[""], runtimes, graph.inputs, graph.outputs)
    weights = {}
    with (folder / spec.data).open("wb") as data:
        for weight in graph.weights:
            data.seek(-data.tell() % WEIGHT_ALIGNMENT, io.SEEK_CUR)
            weights[weight.name] = WeightSpec(weight.dtype, weight.shape, data.tell(), weight.quantization)
            data.write(load(weight, read).reshape(-1).view(np.uint8).data)  # NumPy exports no buffer of fp8
            on_progress(weight.bytes)
    spec = replace(spec, weights=weights)
    _save_on(spec, graph, folder / spec.file)
    return spec


def write_tensorrt(graph: Graph, portable: GraphSpec, folder: Path) -> GraphSpec:
    """Writes a graph as TensorRT fuses it, on the data file of its portable form, whose weights it has.

    Returns:
        The entry in bundle.json with the graph for TensorRT.
    """
    file = f"{graph.name}.tensorrt.onnx"
    _save_on(portable, graph, folder / file)
    return replace(portable, tensorrt=file)


def _save_on(portable: GraphSpec, graph: Graph, file: Path) -> None:
    """Saves a graph whose weights lie in the portable form's data file."""
    stored = portable.weights or {}
    initializers = [external_tensor(w.name, stored[w.name], portable.data) for w in graph.weights]
    onnx.save(model_proto(graph, graph.inputs, initializers), file)
    onnx.checker.check_model(str(file))


def write_device(graph: Graph, portable: GraphSpec, read: Read, folder: Path) -> GraphSpec:
    """Writes the device form of a graph, on the data file of its portable form.

    The weights that both have in one dtype are inputs, after the others: the runtime brings them to the device, faster
    than an engine would, and keeps one copy for this graph and for the kernel that decodes. The few that only this form
    has are stored in its own file.

    Args:
        graph: The graph in its device form.
        portable: What :func:`write_portable` returned.
        read: Reads a tensor of the checkpoint.
        folder: Where to write.

    Returns:
        The entry in bundle.json with the device graph.

    Raises:
        TangoError: fp16 does not hold a value.
    """
    graph, stored = fused_gelus(graph), portable.weights or {}
    shared = {w.name: w for w in graph.weights if w.name in stored and w.dtype == stored[w.name].dtype}
    taken = [TensorSpec(name, shared[name].dtype, shared[name].shape) for name in stored if name in shared]
    own = [numpy_helper.from_array(load(w, read), w.name) for w in graph.weights if w.name not in shared]
    inputs = (*graph.inputs, *taken)
    untried = any(node.op_type in device.UNTRIED_IN_TENSORRT for node in graph.nodes)
    runtimes: tuple[Runtime, ...] = ("onnxruntime",) if untried else ("onnxruntime", "tensorrt")
    spec = GraphSpec(f"{graph.name}.device.onnx", portable.opset, runtimes, inputs, graph.outputs)
    onnx.save(model_proto(graph, inputs, own), folder / spec.file)  # onnx's checker does not know these operators
    return replace(portable, device=spec)


def write_prune(params: PruneParams, features: TensorSpec, folder: Path) -> GraphSpec:
    """Writes the graph of the Tango operator: one node, with the functions that say what it computes.

    Args:
        params: The operator's parameters, its attributes.
        features: The vision graph's features.
        folder: Where to write.
    """
    frames, width = features.shape[0], features.shape[2]
    salience = TensorSpec("salience", "float32", features.shape[:2])
    inputs = (features, salience, TensorSpec("timestamps", "float32", (frames,)))
    outputs = (
        TensorSpec("tokens", features.dtype, ("K", width)),
        TensorSpec("indices", "int32", ("K",)),
        TensorSpec("count", "int32", ()),
    )
    node = helper.make_node(op.NAME, [t.name for t in inputs], [t.name for t in outputs], op.NAME, domain=op.DOMAIN)
    for name, value in op.node_attributes(params).items():
        # An empty list does not say what it is a list of.
        kind = {int: AttributeProto.INT, str: AttributeProto.STRING, list: AttributeProto.INTS}[type(value)]
        node.attribute.append(helper.make_attribute(name, value, attr_type=kind))
    form = replace(PORTABLE, opsets={**PORTABLE.opsets, op.DOMAIN: 1})
    model = model_proto(Graph("prune", form, inputs, outputs, (node,), (), ()), inputs, [])
    model.functions.extend(prune_functions(params))
    onnx.checker.check_model(model)
    onnx.save(model, folder / "prune.onnx")
    return GraphSpec("prune.onnx", PORTABLE.opsets[""], ("onnxruntime", "tensorrt"), inputs, outputs)


def load(weight: Weight, read: Read) -> Array:
    """The values of a weight in its own dtype, C-contiguous.

    Raises:
        TangoError: They are not finite, in the checkpoint or in that dtype, or of another shape.
    """
    values = weight.values(read)
    if values.shape != weight.shape:
        raise TangoError(
            f"{weight.name} has shape {list(values.shape)}, the graph takes {list(weight.shape)}",
            "this is a fault of the model's definition; please report it",
        )
    loaded = _converted(values, np.dtype(weight.dtype))
    if not _is_finite(loaded):
        if not np.isfinite(values).all():
            raise TangoError(f"{weight.name} holds NaN or infinity", "the checkpoint is damaged: download it again")
        raise TangoError(f"{weight.name} has values that {weight.dtype} does not hold", "export with --dtype fp32")
    return loaded


def external_tensor(name: str, weight: WeightSpec, location: str) -> TensorProto:
    """An initializer whose values lie in an external data file."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(weight.dtype))
    proto = TensorProto(name=name, data_type=kind, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", weight.offset), ("length", weight.end - weight.offset)):
        proto.external_data.add(key=key, value=str(value))
    return proto


def _converted(values: Array, dtype: np.dtype[np.generic]) -> Array:
    if values.dtype == dtype and values.flags.c_contiguous:
        return values
    loaded = np.empty(values.shape, dtype)
    by_columns = values.ndim == 2 and values.flags.f_contiguous
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is rejected
        for begin in range(0, values.shape[1] if by_columns else len(values), _ROWS):
            part = (slice(None), slice(begin, begin + _ROWS)) if by_columns else (slice(begin, begin + _ROWS),)
            loaded[part] = values[part]
    return loaded


def _is_finite(values: Array, size: int = 1 << 18) -> bool:
    """Whether a contiguous array has neither NaN nor infinity, by its bits: np.isfinite is ten times slower on fp16."""
    if values.dtype.kind in "iu":
        return True
    unsigned = np.dtype(f"u{values.itemsize}")
    infinity, magnitude = np.array(np.inf, values.dtype).view(unsigned), np.iinfo(unsigned).max >> 1
    bits = values.reshape(-1).view(unsigned)
    return all((bits[i : i + size] & magnitude).max() < infinity for i in range(0, bits.size, size))


def model_proto(graph: Graph, inputs: Iterable[TensorSpec], initializers: list[TensorProto]) -> onnx.ModelProto:
    """A graph as ONNX, with the given inputs and weights."""
    used = sorted({node.op_type for node in graph.nodes if node.domain == op.DOMAIN})
    made = helper.make_graph(
        graph.nodes,
        graph.name,
        [_value_info(tensor) for tensor in inputs],
        [_value_info(tensor) for tensor in graph.outputs],
        [*graph.constants, *initializers],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in graph.form.opsets.items()]
    return helper.make_model(
        made,
        opset_imports=opsets,
        functions=[graph.form.functions[name] for name in used if name in graph.form.functions],
        ir_version=helper.find_min_ir_version_for(opsets, ignore_unknown=True),
        producer_name="tango-edge",
    )


def _value_info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape))
