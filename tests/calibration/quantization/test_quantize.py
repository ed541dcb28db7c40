"""Linear layers are rewritten, everything else stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tango_calibration.quantization.arithmetic import smoothing
from tango_calibration.quantization.layers import GraphWeights, linear_layers, read_graph
from tango_calibration.quantization.quantize import FP8_OPSET, Scheme, quantize, write_quantized
from tango_calibration.quantization.replay import open_graph
from tango_plugins import TangoError
from tango_runtime.backends.ort_cpu import open_session
from tango_runtime.backends.ort_options import session_options

IN, OUT = 80, 48  # 80 is no multiple of a block


@pytest.fixture(scope="module")
def graph():
    """A norm's gain, a cast to fp16, two layers after it, and a third after their product."""
    rng = np.random.default_rng(0)
    gain = rng.uniform(0.5, 2, IN).astype(np.float32)
    gain[3] *= 60  # an outlier, as norms have them
    first, second = (rng.normal(0, 0.1, (IN, OUT)).astype(np.float16) for _ in range(2))
    third = rng.normal(0, 0.1, (OUT, 5)).astype(np.float16)
    named = {"norm.weight": gain, "a.weight": first, "b.weight": second, "c.weight": third}
    nodes = [
        helper.make_node("Mul", ["x", "norm.weight"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["narrow"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["narrow", "a.weight"], ["left"]),
        helper.make_node("Sigmoid", ["left"], ["gate"]),
        helper.make_node("MatMul", ["narrow", "b.weight"], ["right"]),
        helper.make_node("Mul", ["gate", "right"], ["gated"]),
        helper.make_node("MatMul", ["gated", "c.weight"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", IN])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["N", 5])]
    values = [numpy_helper.from_array(value, name) for name, value in named.items()]
    made = helper.make_graph(nodes, "g", inputs, outputs, values)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).normal(size=(64, IN)).astype(np.float32)


def run(model, x, *, more=()):
    return open_graph(model, Path(), more).run(None, {"x": x})


def ranges_of(graph, x, by=None):
    names = ["narrow", "gated"]
    values = [v / (by or {}).get(n, 1) for n, v in zip(names, run(graph, x, more=names)[1:], strict=True)]
    return {name: float(np.abs(value).max()) for name, value in zip(names, values, strict=True)}


def quantized(graph, scheme):
    model = quantize(graph, GraphWeights(graph, Path()), scheme)
    onnx.checker.check_model(model, full_check=True)
    return model


def error(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(a)


def test_layers_and_their_gains(graph):
    found = {layer.name: (layer.input, layer.output, layer.gain) for layer in linear_layers(graph)}
    assert found == {
        "a": ("narrow", "left", "norm.weight"),
        "b": ("narrow", "right", "norm.weight"),
        "c": ("gated", "y", "b.weight"),
    }


def test_no_gain_if_another_node_reads_the_input(graph):
    other = onnx.ModelProto.FromString(graph.SerializeToString())
    other.graph.node.append(helper.make_node("Identity", ["narrow"], ["elsewhere"]))
    assert [layer.gain for layer in linear_layers(other)] == [None, None, "b.weight"]


def test_w8a8_is_symmetric_per_channel_opset_17_and_close(graph, x):
    model = quantized(graph, Scheme(dict.fromkeys("abc", "w8a8"), ranges_of(graph, x)))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = values[node.input[1]], values[node.input[2]]
            assert scale.dtype == np.float32
            assert (scale > 0).all()
            assert zero.dtype == np.int8
            assert not zero.any()
    assert values["a.weight.scale"].shape == (OUT,)
    quantized_tensors = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantized_tensors == ["scaled", "scaled", "c.input.fp32"]  # the fp32 tensor where there is one
    assert error(run(graph, x)[0], run(model, x)[0]) < 0.1


@pytest.mark.parametrize("float_weights", [False, True])
def test_w8a8_runs_as_integers(graph, x, tmp_path, float_weights):
    scheme = Scheme(dict.fromkeys("abc", "w8a8"), ranges_of(graph, x), float_weights=float_weights)
    model = quantized(graph, scheme)
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 3
    assert "MatMul" not in kinds


def test_float_weights_give_the_same_results(graph, x):
    """TensorRT 8 reads no stored int8: a float weight has its own Q/DQ pair."""
    scheme = Scheme(dict.fromkeys("abc", "w8a8"), ranges_of(graph, x))
    compact, wide = quantized(graph, scheme), quantized(graph, replace(scheme, float_weights=True))
    assert (run(compact, x)[0] == run(wide, x)[0]).all()
    stored = {t.name: t.data_type for t in wide.graph.initializer if not t.name.endswith(".zero")}
    assert TensorProto.INT8 not in stored.values()
    made = {node.output[0]: node for node in wide.graph.node}
    for layer in linear_layers(graph):
        dequantize = made[made[f"{layer.output}.product"].input[1]]
        quantize = made[dequantize.input[0]]
        assert [dequantize.op_type, quantize.op_type] == ["DequantizeLinear", "QuantizeLinear"]
        assert dequantize.input[1:] == quantize.input[1:]
        assert stored[quantize.input[0]] == TensorProto.FLOAT


def test_fp8_is_fp16_at_its_opset_and_close(graph, x):
    model = quantized(graph, Scheme(dict.fromkeys("abc", "fp8"), ranges_of(graph, x)))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", FP8_OPSET)]
    types = {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert [types[name] for name in node.input[1:]] == [TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN]
    assert types["a.weight.fp8"] == TensorProto.FLOAT8E4M3FN
    assert [n.op_type for n in model.graph.node].count("Cast") == 1  # the graph's own
    with np.errstate(all="ignore"):  # its Sigmoid overflows harmlessly
        reference = ReferenceEvaluator(model).run(None, {"x": x})[0]
    assert error(run(graph, x)[0], reference) < 0.1
    session = open_graph(model, Path())
    assert error(reference, session.run(None, {"x": x})[0]) < 0.01  # ONNX Runtime's kernels agree


def test_an_axes_attribute_becomes_an_input(graph, x):
    other = onnx.ModelProto.FromString(graph.SerializeToString())
    other.graph.output[0].name = "mean"
    other.graph.node.append(helper.make_node("ReduceMean", ["y"], ["mean"], axes=[-1], keepdims=1))
    other.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    model = quantized(other, Scheme({"a": "fp8"}, ranges_of(graph, x)))
    assert run(model, x)[0].shape == (64, 1)


@pytest.mark.parametrize(("tokens", "rank"), [(4, 2), ("T", 3)])
def test_a_product_of_a_higher_rank_becomes_a_matrix_product(x, tokens, rank):
    """If the shape is known; otherwise the product stays as it is."""
    weight = np.random.default_rng(0).normal(size=(IN, OUT)).astype(np.float16)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["F", tokens, IN])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["F", tokens, OUT])]
    nodes = [helper.make_node("MatMul", ["x", "a.weight"], ["y"])]
    made = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(weight, "a.weight")])
    graph = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    frames = x.reshape(-1, 4, IN).astype(np.float16)
    model = quantized(graph, Scheme({"a": "w8a8"}, {"x": float(np.abs(x).max())}))
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in inferred}
    assert ranks["y.product"] == rank
    (expected,), (found,) = run(graph, frames), run(model, frames)
    assert expected.shape == found.shape
    assert error(expected, found) < 0.02


def test_a_fp32_graph_needs_no_casts(x):
    weight = np.random.default_rng(0).normal(size=(IN, OUT)).astype(np.float32)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", IN])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", OUT])]
    nodes = [helper.make_node("MatMul", ["x", "a.weight"], ["y"])]
    made = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(weight, "a.weight")])
    graph = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = quantized(graph, Scheme({"a": "w8a8"}, {"x": float(np.abs(x).max())}))
    assert not any(node.op_type == "Cast" for node in model.graph.node)
    assert error(run(graph, x)[0], run(model, x)[0]) < 0.02


@pytest.mark.parametrize(("form", "bits", "most"), [("w4a16", 4, 0.15), ("w8a16", 8, 0.03)])
def test_blocks_run_with_small_error(graph, x, form, bits, most):
    model = quantized(graph, Scheme(dict.fromkeys("abc", form)))
    assert ("com.microsoft", 1) in [(o.domain, o.version) for o in model.opset_import]
    kinds = [(n.op_type, helper.get_node_attr_value(n, "bits")) for n in model.graph.node if "NBits" in n.op_type]
    assert kinds == [("MatMulNBits", bits)] * 3
    assert error(run(graph, x)[0], run(model, x)[0]) < most


def test_only_chosen_layers_change(graph, x):
    model = quantized(graph, Scheme({"c": "w4a16"}))
    before, after = (run(m, x, more=["left", "right"]) for m in (graph, model))
    assert (before[1] == after[1]).all()
    assert (before[2] == after[2]).all()
    assert (before[0] != after[0]).any()


def test_smoothing_alone_is_exact(graph, x):
    channels = np.abs(run(graph, x, more=["narrow"])[1]).max(0).astype(np.float32)
    s = smoothing(channels, np.full(IN, 0.3, np.float32))
    assert (np.log2(s) % 1 == 0).all()
    assert s[3] == s.max() > 1
    by = {"narrow": s, "gated": np.exp2(np.arange(OUT) % 5 - 2).astype(np.float32)}
    assert (run(graph, x)[0] == run(quantized(graph, Scheme({}, smoothing=by)), x)[0]).all()


def test_smoothing_helps_against_outliers(graph, x):
    channels = np.abs(run(graph, x, more=["narrow"])[1]).max(0).astype(np.float32)
    by = {"narrow": smoothing(channels, np.full(IN, 0.3, np.float32))}
    forms = {"a": "w8a8", "b": "w8a8"}
    plain = quantized(graph, Scheme(forms, ranges_of(graph, x)))
    smooth = quantized(graph, Scheme(forms, ranges_of(graph, x, by), by))
    expected = run(graph, x)[0]
    assert error(expected, run(smooth, x)[0]) < 0.8 * error(expected, run(plain, x)[0])


@pytest.mark.parametrize("forms", [{"a": "w8a8", "b": "w4a16"}, {"a": "fp8", "b": "fp8"}])
def test_a_written_graph_equals_the_graph_in_memory(graph, x, tmp_path, forms):
    scheme = Scheme(forms, ranges_of(graph, x))
    write_quantized(tmp_path / "g.onnx", graph, GraphWeights(graph, Path()), scheme)
    assert (tmp_path / "g.onnx.data").stat().st_size > 0
    session = open_session(tmp_path / "g.onnx")
    assert (session.run(None, {"x": x})[0] == run(quantized(graph, scheme), x)[0]).all()
    reread = GraphWeights(read_graph(tmp_path / "g.onnx"), tmp_path)
    assert (reread["c.weight"] == GraphWeights(graph, Path())["c.weight"]).all()


def test_a_scalar_stays_a_scalar(graph, tmp_path):
    """TensorRT's parser aborts on a Range whose limits are vectors of one element."""
    made = onnx.ModelProto.FromString(graph.SerializeToString())
    made.graph.initializer.append(numpy_helper.from_array(np.array(3, np.int64), "limit"))
    made.graph.node.append(helper.make_node("Range", ["limit", "limit", "limit"], ["nothing"]))
    made.graph.output.append(helper.make_tensor_value_info("nothing", TensorProto.INT64, [None]))
    write_quantized(tmp_path / "g.onnx", made, GraphWeights(made, Path()), Scheme({"a": "w8a8"}, {"narrow": 1.0}))
    kept = onnx.load(tmp_path / "g.onnx").graph.initializer
    assert [list(t.dims) for t in kept if t.name == "limit"] == [[]]


def test_a_missing_layer_is_named(graph):
    with pytest.raises(TangoError, match="no linear layer nowhere"):
        quantized(graph, Scheme({"nowhere": "w4a16"}))
