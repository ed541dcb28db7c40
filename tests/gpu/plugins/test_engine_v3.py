"""Every V3 plugin in an engine of its own, made by the ONNX parser: it gives the bits of the C function.

Needs TensorRT 10 or later, or TensorRT-RTX under its name, and the plugins built with its headers.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from onnx import AttributeProto, helper

from tango_export.graph.operators import FUNCTIONS
from tango_plugins import op
from tango_runtime.engines.plugins import load_plugins
from tango_runtime.system import gpu as system
from tests.gpu.plugins.nodes import NODES

#: Lets attention give its outputs the memory of the cache.
IN_PLACE = "ALIASED_PLUGIN_IO_10_03"


@pytest.fixture(scope="module")
def trt():
    """The module ``tensorrt``, with the plugins registered."""
    found = pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    plugin = system.plugin()
    if plugin is None or plugin.api != "V3" or not plugin.serves(found.__version__):
        pytest.skip(f"there are no V3 plugins for TensorRT {found.__version__} (tango plugin build)")
    load_plugins(found, plugin.path)
    return found


def model(operator, node):
    """A graph of one node, in which the first axis of the first input, and what is as long, has any length."""
    rows = next(iter(node.inputs.values())).shape[0]
    inputs = [
        value_info(name, tensor, ["rows" if tensor.shape[0] == rows else tensor.shape[0], *tensor.shape[1:]])
        for name, tensor in node.inputs.items()
    ]
    outputs = [value_info(name, tensor, [None] * tensor.ndim) for name, tensor in node.outputs.items()]
    made = helper.make_node(operator, list(node.inputs), list(node.outputs), operator, domain=op.DOMAIN)
    for key, value in (node.attributes | op.PLUGIN_ATTRIBUTES).items():
        kind = AttributeProto.INTS if isinstance(value, list) else None  # an empty list does not say what it holds
        made.attribute.append(helper.make_attribute(key, value, attr_type=kind))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(op.DOMAIN, 1)]
    graph = helper.make_graph([made], operator, inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def value_info(name, tensor, shape):
    dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)


@cache
def logger(trt):
    return trt.Logger(trt.Logger.WARNING)


def build(trt, name, node):
    """The serialized engine of a node, for 1 to as many rows as it has."""
    builder = trt.Builder(logger(trt))
    flags = trt.NetworkDefinitionCreationFlag.__members__
    network = builder.create_network(1 << int(flags["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in flags else 0)
    parser = trt.OnnxParser(network, logger(trt))
    assert parser.parse(model(name, node)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    if IN_PLACE in trt.PreviewFeature.__members__:
        config.set_preview_feature(trt.PreviewFeature.__members__[IN_PLACE], True)
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        largest = tuple(node.inputs[tensor.name].shape)
        profile.set_shape(tensor.name, tuple(abs(n) for n in tensor.shape), largest, largest)  # -1 is 1 row
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return engine


def enqueue(trt, engine, node):
    """Runs an engine on the tensors of a node."""
    loaded = trt.Runtime(logger(trt)).deserialize_cuda_engine(engine)
    context = loaded.create_execution_context()
    for name, tensor in node.inputs.items():
        assert context.set_input_shape(name, tuple(tensor.shape)), name
    for name, tensor in (node.inputs | node.outputs).items():
        assert context.set_tensor_address(name, tensor.data_ptr()), name
    assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


def poison(node):
    for name, tensor in node.outputs.items():
        if name not in node.in_place:
            tensor.fill_(7)


#: TensorRT's engines give no plugin a tensor of uint8.
TRIED = [name for name in NODES if name not in ("BlockwiseLinear", "BlockwiseAffineLinear")]


@pytest.mark.parametrize("name", TRIED)
def test_an_engine_gives_the_bits_of_the_c_function(trt, name):
    found, wanted = NODES[name](), NODES[name]()
    poison(found)
    poison(wanted)
    enqueue(trt, build(trt, name, found), found)
    assert wanted.call() == 0
    torch.cuda.synchronize()
    for output, tensor in found.outputs.items():
        expected = wanted.outputs[output]
        assert tensor.cpu().numpy().tobytes() == expected.cpu().numpy().tobytes(), output
        assert output in found.in_place or not (tensor == 7).all(), output


def test_every_operator_is_here():
    assert set(NODES) == {*(name for name in FUNCTIONS if "Int8" not in name), op.NAME}
