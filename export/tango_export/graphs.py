"""Modules → ONNX, each graph with one external data file.

A module is traced on the meta device, so tracing needs no weights and no memory; the weights then stream from the
checkpoint into the data file, one tensor at a time. torch's TorchScript exporter is used because it does this at
opset 17 as it is; the newer exporter starts at opset 18, which TensorRT 8.6 does not read.

What a module must see to, for TensorRT's parser (onnx-tensorrt, release/8.6-GA, builtin_op_importers.cpp; checked node
by node, and against 10.1, which refuses nothing of it):

- Sizes that the configuration knows are numbers. ``x.shape[-1] ** -0.5``, ``chunk`` and ``flatten`` leave arithmetic on
  shapes in the graph, partly in float, which the parser does not fold. So only F, N and P are read from tensors.
- uint8 is an input that a cast reads, and nothing else; up to 8.6 int64 becomes int32, so no integer may exceed it.
- No tensor but the cache is ever empty.
- Both operands of an operator have one dtype: strongly typed networks (10 on) insert no cast.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.bundle import WEIGHT_ALIGNMENT, GraphName, GraphSpec, Runtime, TensorSpec
from tango_runtime.util.console import OnProgress

OPSET = 17

#: Where each parameter's values come from; called once, when the parameter is written.
Weights = Mapping[str, Callable[[], Tensor]]

TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32, "int64": torch.int64, "uint8": torch.uint8}
_ONNX_DTYPES = {torch.float16: TensorProto.FLOAT16, torch.float32: TensorProto.FLOAT}

#: Sizes that dynamic axes have while tracing: any will do, but no two alike and none that a module has itself.
_TRACED = {"F": 2, "N": 3, "P": 5}


@dataclass(frozen=True)
class Graph:
    """A module to be written, and what its tensors are called.

    Attributes:
        name: Name in the bundle.
        module: The module, on the meta device.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        weights: Values of every parameter of the module, by name.
    """

    name: GraphName
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: Weights

    @property
    def weight_bytes(self) -> int:
        """Bytes of the external data."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())

    @property
    def spec(self) -> GraphSpec:
        """The graph's entry in bundle.json."""
        return _spec(self.name, self.inputs, self.outputs, ("onnxruntime", "tensorrt"))


def write_graph(graph: Graph, folder: Path, on_progress: OnProgress) -> None:
    """Writes a graph and its external data.

    Args:
        graph: What to write.
        folder: Where.
        on_progress: Told the bytes of each weight written.

    Raises:
        TangoError: A weight's shape is not the module's.
    """
    model = _trace(graph)
    _fold_constants(model)
    _drop_idle_casts(model)
    _name_dimensions(model, graph)
    _write_weights(model, graph, folder, on_progress)
    file = folder / graph.spec.file
    onnx.save(model, file)
    onnx.checker.check_model(str(file))


def write_prune_graph(params: PruneParams, features: TensorSpec, folder: Path) -> GraphSpec:
    """Writes the graph of the operator: one node, for TensorRT's plugin.

    Args:
        params: The operator's parameters, its attributes.
        features: The vision graph's features.
        folder: Where.
    """
    frames, width = features.shape[0], features.shape[2]
    inputs = (
        features,
        TensorSpec("salience", "float32", features.shape[:2]),
        TensorSpec("timestamps", "float32", (frames,)),
    )
    outputs = (
        TensorSpec("tokens", features.dtype, ("K", width)),
        TensorSpec("indices", "int32", ("K",)),
        TensorSpec("count", "int32", ()),
    )
    spec = _spec("prune", inputs, outputs, ("tensorrt",))
    names = [t.name for t in inputs], [t.name for t in outputs]
    node = helper.make_node(op.NAME, *names, op.NAME, domain=op.DOMAIN)
    for name, value in op.node_attributes(params).items():
        # Typed by hand: an empty list does not say what it is a list of.
        kind = {int: AttributeProto.INT, str: AttributeProto.STRING, list: AttributeProto.INTS}[type(value)]
        node.attribute.append(helper.make_attribute(name, value, attr_type=kind))
    graph = helper.make_graph([node], "prune", [value_info(t) for t in inputs], [value_info(t) for t in outputs])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(op.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="tango-edge")
    onnx.checker.check_model(model)
    onnx.save(model, folder / spec.file)
    return spec


def _spec(
    name: GraphName, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], runtimes: tuple[Runtime, ...]
) -> GraphSpec:
    return GraphSpec(f"{name}.onnx", OPSET, runtimes, tuple(inputs), tuple(outputs))


def value_info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    """An input or output, as ONNX says it."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape))


def _trace(graph: Graph) -> onnx.ModelProto:
    examples = tuple(
        torch.empty(
            [_TRACED[n] if isinstance(n, str) else n for n in t.shape], dtype=TORCH_DTYPES[t.dtype], device="meta"
        )
        for t in graph.inputs
    )
    dynamic = {t.name: {i: n for i, n in enumerate(t.shape) if isinstance(n, str)} for t in graph.inputs}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TracerWarning)  # a traced constant would be a wrong graph
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            graph.module.eval(),
            examples,
            buffer,  # type: ignore[arg-type]  # the TorchScript exporter takes a file, its annotation does not say so
            dynamo=False,
            opset_version=OPSET,
            export_params=False,
            keep_initializers_as_inputs=True,  # or the exporter compares the parameters' values, and these have none
            do_constant_folding=False,
            input_names=[t.name for t in graph.inputs],
            output_names=[t.name for t in graph.outputs],
            dynamic_axes=dynamic,
        )
    return onnx.load_from_string(buffer.getvalue())


def _fold_constants(model: onnx.ModelProto) -> None:
    """Turns what can be computed now into initializers.

    TensorRT 8.6 wants the axes of a Slice or Unsqueeze as weights, and does not compute so much as the Unsqueeze of a
    constant to get them (onnx-tensorrt, release/8.6-GA, builtin_op_importers.cpp). The parameters are still inputs
    here, so only numbers are touched, and no weight is read.
    """
    known: set[str] = set()
    constant, rest = [], []
    for node in model.graph.node:
        if known.issuperset(node.input):
            constant.append(node)
            known.update(node.output)
        else:
            rest.append(node)
    used = sorted(known.intersection(name for node in rest for name in node.input))
    outputs = [helper.make_empty_tensor_value_info(name) for name in used]
    folded = helper.make_model(
        helper.make_graph(constant, "constants", [], outputs),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    values = ReferenceEvaluator(folded).run(None, {})
    del model.graph.node[:]
    model.graph.node.extend(rest)
    model.graph.initializer.extend(map(numpy_helper.from_array, map(np.asarray, values), used))


def _drop_idle_casts(model: onnx.ModelProto) -> None:
    """Leaves out casts to the dtype that a tensor has already, of which TensorRT 8.6 would make layers."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input)}
    outputs = {v.name for v in model.graph.output}
    same: dict[str, str] = {}
    rest = []
    for node in model.graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        idle = node.op_type == "Cast" and types.get(node.input[0]) == node.attribute[0].i
        if idle and node.output[0] not in outputs:
            same[node.output[0]] = node.input[0]
        else:
            rest.append(node)
    del model.graph.node[:]
    model.graph.node.extend(rest)


def _name_dimensions(model: onnx.ModelProto, graph: Graph) -> None:
    """Gives inputs and outputs the names and sizes that bundle.json says, in place of the exporter's inventions."""
    inputs = {t.name for t in graph.inputs}
    parameters = [v for v in model.graph.input if v.name not in inputs]
    del model.graph.input[:], model.graph.output[:]
    model.graph.input.extend([*map(value_info, graph.inputs), *parameters])
    model.graph.output.extend(map(value_info, graph.outputs))


def _write_weights(model: onnx.ModelProto, graph: Graph, folder: Path, on_progress: OnProgress) -> None:
    """Turns the parameters, which the trace left as inputs, into initializers in the external data file."""
    location = graph.spec.data
    parameters = dict(graph.module.named_parameters())
    names = [v.name for v in model.graph.input if v.name in parameters]
    kept = [v for v in model.graph.input if v.name not in parameters]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    with (folder / location).open("wb") as data:
        for name in names:
            tensor = _fitted(name, graph.weights[name](), parameters[name])
            data.seek(-data.tell() % WEIGHT_ALIGNMENT, io.SEEK_CUR)
            model.graph.initializer.append(_external(name, tensor, location, data.tell()))
            data.write(tensor.numpy().data)
            on_progress(tensor.numel() * tensor.element_size())


def _fitted(name: str, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    if tensor.shape != parameter.shape:
        raise TangoError(
            f"{name} has shape {list(tensor.shape)}, the graph takes {list(parameter.shape)}",
            "this is a fault of the family's weights; please report it",
        )
    if not tensor.isfinite().all():
        raise TangoError(f"{name} holds NaN or infinity", "the checkpoint is damaged: download it again")
    fitted = tensor.to(parameter.dtype).contiguous()
    if not fitted.isfinite().all():
        raise TangoError(f"{name} has values that {parameter.dtype} does not hold", "export with --dtype fp32")
    return fitted


def _external(name: str, tensor: Tensor, location: str, offset: int) -> TensorProto:
    proto = TensorProto(name=name, data_type=_ONNX_DTYPES[tensor.dtype], dims=tensor.shape)
    proto.data_location = TensorProto.EXTERNAL
    length = tensor.numel() * tensor.element_size()
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))
    return proto
