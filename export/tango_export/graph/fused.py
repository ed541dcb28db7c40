"""What becomes one node in the device form once its graph is whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from tango_export.graph.builder import Graph
from tango_plugins import op

#: Multiple of the widths of a product with a GELU (tango/linear.h).
_WIDTH_MULTIPLE = 8

#: A product, and the GELU after it → both in one.
_GELUS = {("Linear", "BiasFastGelu"): "LinearGelu", ("Fp8Linear", "BiasFastGeluFp8"): "Fp8LinearGelu"}


def fused_gelus(graph: Graph) -> Graph:
    """The graph with each tanh GELU as part of the product before it, where nothing else reads that product.

    One that writes FP8 gives the inverse of its scale as a constant. Products of widths that the kernel does not take
    stay apart.
    """
    shapes = {weight.name: weight.shape for weight in graph.weights}

    def takes(product: NodeProto) -> bool:
        return not any(width % _WIDTH_MULTIPLE for width in shapes[product.input[1]])

    readers = Counter(value for node in graph.nodes for value in node.input)
    makers = {node.output[0]: node for node in graph.nodes if readers[node.output[0]] == 1}
    nodes, constants, fused = list[NodeProto](), list(graph.constants), set[str]()
    for node in graph.nodes:
        product = makers.get(node.input[0])
        if product is not None and (kind := _GELUS.get((product.op_type, node.op_type))) and takes(product):
            fused.add(product.name)
            inputs = [*product.input, node.input[1]]
            if any(attribute.name == "y_scale" for attribute in node.attribute):
                factor = np.array(1 / helper.get_node_attr_value(node, "y_scale"), np.float32)
                constants.append(numpy_helper.from_array(factor, f"{node.name}.y_factor"))
                inputs.append(constants[-1].name)
            node = helper.make_node(kind, inputs, node.output, node.name, domain=op.DOMAIN)
            node.attribute.extend(product.attribute)
        nodes.append(node)
    return replace(graph, nodes=tuple(n for n in nodes if n.name not in fused), constants=tuple(constants))
