"""The linear layers of a graph, and its weights on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tango_calibration.quantization.ranges import Array
from tango_plugins import TangoError
from tango_runtime.util.errors import first_line
from tango_runtime.util.files import is_plain_name

_VERIFY = "check the bundle with: tango inspect BUNDLE --verify"


@dataclass(frozen=True)
class LinearLayer:
    """A matrix product whose right side is a stored matrix.

    Attributes:
        name: Name of its weight, without ``.weight``.
        weight: Its initializer, [in, out].
        input: The activations that it takes, [..., in].
        output: Its result, [..., out].
        gain: The initializer whose last axis scales the channels of ``input`` and nothing else: a norm's weight, or the
            weight of the linear layer whose output is multiplied into ``input``. None if there is none.
    """

    name: str
    weight: str
    input: str
    output: str
    gain: str | None


def read_graph(file: Path) -> ModelProto:
    """Reads a graph without its external data."""
    return onnx.load(file, load_external_data=False)


class GraphWeights:
    """The initializers of a graph, memory-mapped.

    Args:
        model: The graph.
        folder: Folder of its external data.
    """

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self._protos = {proto.name: proto for proto in model.graph.initializer}
        self._folder = folder

    def __contains__(self, name: str) -> bool:
        return name in self._protos

    def __getitem__(self, name: str) -> Array:
        proto = self._protos[name]
        if proto.data_location != TensorProto.EXTERNAL:
            return np.asarray(numpy_helper.to_array(proto))
        entry = {e.key: e.value for e in proto.external_data}
        shape, dtype = tuple(proto.dims), helper.tensor_dtype_to_np_dtype(proto.data_type)
        if 0 in shape:
            return np.zeros(shape, dtype)
        location = str(entry.get("location"))
        if not is_plain_name(location):
            raise TangoError(f"{name} lies in {location!r}, which is no file of {self._folder}", _VERIFY)
        try:
            return np.memmap(self._folder / location, dtype, "r", int(entry.get("offset", 0)), shape)
        except (OSError, ValueError, OverflowError) as error:
            raise TangoError(f"{name} is not in {self._folder / location}: {first_line(error)}", _VERIFY) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._protos[name].dims)


def linear_layers(model: ModelProto) -> list[LinearLayer]:
    """Lists the linear layers of a graph in its order: products with a stored matrix whose name ends in ``.weight``.

    Matrices that an fp16 graph keeps in fp32 (the salience head's probe) have other names: they must stay fp32.
    """
    weights = GraphWeights(model, Path())
    nodes = {output: node for node in model.graph.node for output in node.output}
    users: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def is_linear(node: NodeProto) -> bool:
        right = node.input[1] if node.op_type == "MatMul" else ""
        return right in weights and len(weights.shape(right)) == 2 and right.endswith(".weight")

    def gain(name: str) -> str | None:
        """Follows the activations back to what scales their channels, as long as only linear layers read them."""
        if not all(map(is_linear, users[name])):
            return None
        node = nodes.get(name)
        if node is not None and node.op_type == "Cast":
            node = _if_read_once(nodes.get(node.input[0]), users)
        if node is None or node.op_type != "Mul":
            return None
        for factor in node.input:
            if factor in weights and len(weights.shape(factor)) == 1:
                return str(factor)
            before = _if_read_once(nodes.get(factor), users)
            if before is not None and is_linear(before):
                return str(before.input[1])
        return None

    return [
        LinearLayer(n.input[1].removesuffix(".weight"), n.input[1], n.input[0], n.output[0], gain(n.input[0]))
        for n in model.graph.node
        if is_linear(n)
    ]


def _if_read_once(node: NodeProto | None, users: Mapping[str, list[NodeProto]]) -> NodeProto | None:
    return node if node is not None and len(users[node.output[0]]) == 1 else None
