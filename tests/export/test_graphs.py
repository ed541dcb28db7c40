"""The four graphs as files: opset, checker, external data, dynamic axes, the operator's node."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from examples.make_checkpoint import VIDEO_LAYOUT
from tango_export.export import Request, export
from tango_export.families import FAMILIES
from tango_export.graph import PORTABLE, GraphBuilder, build
from tango_export.graph.files import external_tensor, write_portable, write_prune
from tango_export.layers import linear, rms_norm
from tango_plugins import PruneParams, op
from tango_runtime.bundle import WEIGHT_ALIGNMENT, Bundle, TensorSpec, WeightSpec
from tests.export.edits import assert_close, embed, frames, logits, run, session

WEIGHED = ("vision", "embed", "decoder")


def proto(folder, graph):
    return onnx.load(folder / f"{graph}.onnx", load_external_data=False)


def constants(folder, graph):
    """The numbers in a graph's own file, by name."""
    found = proto(folder, graph).graph.initializer
    return {t.name: onnx.numpy_helper.to_array(t) for t in found if t.data_location != TensorProto.EXTERNAL}


def entries(tensor):
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.mark.parametrize("graph", [*WEIGHED, "prune"])
def test_opset_and_checker(bundle, graph):
    onnx.checker.check_model(str(bundle() / f"{graph}.onnx"))
    assert {o.domain: o.version for o in proto(bundle(), graph).opset_import}[""] == 17


@pytest.mark.parametrize("graph", WEIGHED)
def test_one_data_file_holds_every_weight_and_nothing_else(bundle, graph):
    weights = list(proto(bundle(), graph).graph.initializer)
    initializers = [t for t in weights if t.data_location == TensorProto.EXTERNAL]
    assert {entries(t)["location"] for t in initializers} == {f"{graph}.onnx.data"}
    assert not any(t.HasField("raw_data") for t in initializers)
    assert all(len(t.raw_data) <= 64 for t in weights if t not in initializers)  # numbers, no weights
    spans = sorted((int(entries(t)["offset"]), int(entries(t)["length"])) for t in initializers)
    end = 0
    for offset, length in spans:
        assert offset == -(-end // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
        end = offset + length
    assert (bundle() / f"{graph}.onnx.data").stat().st_size == end


@pytest.mark.parametrize("graph", [*WEIGHED, "prune"])
def test_bundle_json_says_what_the_graph_says(bundle, graph):
    spec, found = Bundle.load(bundle()).manifest.graphs[graph], proto(bundle(), graph).graph
    for tensors, values in ((spec.inputs, found.input), (spec.outputs, found.output)):
        said = [
            TensorSpec(
                v.name,
                helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name,
                tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim),
            )
            for v in values
        ]
        assert list(tensors) == said


def test_vision_takes_any_number_of_frames(bundle):
    video = frames(3)
    features, salience = run(bundle(precision="fp32"), "vision", frames=video)
    for count in (1, 2):
        fewer = run(bundle(precision="fp32"), "vision", frames=video[:count])
        assert_close(fewer[0], features[:count], 1e-5)
        assert_close(fewer[1], salience[:count], 1e-5)
    np.testing.assert_allclose(salience.sum(-1) * 4, 1, atol=0.1)  # a mean over 2×2 patches: a quarter of their sum


def test_a_graph_reads_like_the_model(bundle):
    nodes = [node for graph in WEIGHED for node in proto(bundle(), graph).graph.node]
    names = {node.name: node for node in nodes}
    assert len(names) == len(nodes)
    for name in ("layers.0.self_attn.o_proj", "layers.1.mlp.down_proj", "lm_head"):
        assert (names[name].op_type, names[name].input[1]) == ("MatMul", f"{name}.weight")
    for name in ("tower.encoder.layers.0.self_attn.out_proj", "tower.encoder.layers.1.mlp.fc1", "projector.linear_1"):
        assert list(names[name].input) == [f"{name}.matmul", f"{name}.bias"]
    outputs = {"features", "salience", "embeddings", "logits", "new_key.0", "new_value.0", "new_key.1", "new_value.1"}
    assert {node.output[0] for node in nodes if node.output[0] != node.name} == outputs


def test_twice_the_same_bytes(checkpoint, bundle, tmp_path):
    llava, siglip = checkpoint("llava-hf")
    again = export(Request(checkpoint=str(llava), salience=str(siglip), output=tmp_path / "again"))
    for file in sorted(bundle().iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_name_is_given_once_and_an_input_must_be_there():
    g = GraphBuilder("embed", PORTABLE, "float16", {})
    x = g.input("x", "float16", 3)
    g.node("Neg", [x], "y")
    with pytest.raises(AssertionError, match="two values are called y"):
        g.node("Abs", [x], "y")
    with pytest.raises(AssertionError, match=r"'z'\} are not there yet"):
        g.node("Abs", ["z"], "w")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_built_graph_knows_its_linear_layers(bundle, precision):
    manifest = Bundle.load(bundle(precision=precision)).manifest
    for definition in FAMILIES["llava-ov"].definitions(manifest):
        graph = build(definition, PORTABLE, manifest.dtype, manifest.graphs[definition.name].weights)
        products = {n.output[0]: tuple(n.input) for n in graph.nodes if n.op_type == "MatMul"}
        assert all(products[layer.output] == (layer.input, layer.weight) for layer in graph.linears)
        shapes = {weight.name: weight.shape for weight in graph.weights}
        assert all(shapes[layer.weight] == (layer.fan_in, layer.fan_out) for layer in graph.linears)
        gains = {layer.name: layer.gain for layer in graph.linears if layer.gain}
        if definition.name == "decoder":
            assert gains.pop("lm_head") == ("norm.weight",)
            assert gains.pop("layers.0.self_attn.qkv_proj") == ("layers.0.input_layernorm.weight",)
            assert gains.pop("layers.1.mlp.gate_proj") == ("layers.1.post_attention_layernorm.weight",)
            assert gains.pop("layers.1.mlp.down_proj") == ("layers.1.mlp.up_proj.weight",)
            assert len(gains) == 9 - 4
        else:
            assert gains == {}


@pytest.mark.parametrize("layout", ["llava-hf", VIDEO_LAYOUT])
def test_the_definition_of_a_bundle_writes_its_graphs(bundle, tmp_path, layout):
    """From its own weights: the same bytes."""
    found = Bundle.load(bundle(layout))
    for definition in FAMILIES[found.manifest.family].definitions(found.manifest):
        spec = found.manifest.graphs[definition.name]
        graph = build(definition, PORTABLE, found.manifest.dtype, spec.weights)

        def read(name, spec=spec):
            weight = spec.weights[name]
            return np.memmap(found.path / spec.data, weight.dtype, "r", weight.offset, weight.shape)

        assert write_portable(graph, read, tmp_path, lambda done: None) == replace(spec, device=None, tensorrt=None)
        for file in (spec.file, spec.data):
            assert (tmp_path / file).read_bytes() == (found.path / file).read_bytes()


def test_what_another_node_reads_is_not_scaled():
    g = GraphBuilder("embed", PORTABLE, "float16", {})
    x, _ = rms_norm(g, "norm", g.input("x", "float16", "N", 8), 8, 1e-6)
    linear(g, "a", x, 8, 4)
    assert [layer.gain for layer in g.finish().linears] == [("norm.weight",)]
    g.node("Neg", [x], "y")
    assert [layer.gain for layer in g.finish().linears] == [()]


#: Where an importer of TensorRT 8.6 reads numbers and not a tensor.
NUMBERS = {"Slice": (1, 2, 3, 4), "Reshape": (1,), "Unsqueeze": (1,), "Squeeze": (1,), "Expand": (1,)}


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("graph", WEIGHED)
def test_tensorrt_8_finds_numbers_where_it_wants_them(bundle, graph, precision):
    folder = bundle(precision=precision)
    known, nodes = constants(folder, graph), proto(folder, graph).graph.node
    for node in nodes:
        assert node.op_type != "Constant"
        assert not known.keys() >= set(node.input), f"{node.name} could be computed now"
        assert all(node.input[i] in known for i in NUMBERS.get(node.op_type, ())), node.name
    assert sum(node.op_type == "Shape" for node in nodes) == (2 if graph == "decoder" else 0)


def test_no_cast_is_idle(bundle):
    for graph in WEIGHED:
        inferred = onnx.shape_inference.infer_shapes(proto(bundle(precision="fp32"), graph)).graph
        types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input)}
        casts = [n for n in inferred.node if n.op_type == "Cast" and n.output[0] != "logits"]
        assert not [n.name for n in casts if types[n.input[0]] == n.attribute[0].i]


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_logits_come_out_of_a_cast(bundle, precision):
    """TensorRT 8.6.0 on an H200 left all logits of the fp32 decoder zero while they came out of a Slice."""
    (last,) = (n for n in proto(bundle(precision=precision), "decoder").graph.node if "logits" in n.output)
    assert last.op_type == "Cast"


def test_prune_node_holds_the_parameters(bundle):
    (node,) = proto(bundle(), "prune").graph.node
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    found = {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
    assert (node.op_type, node.domain) == ("TangoPrune", "tango")
    host = [found.pop(name) for name in ("precision", "plugin_namespace", "plugin_version")]
    assert host == ["fast", "tango", "1"]
    assert {type(value) for value in found.values()} == {int, str, list}
    assert found["retention_ratio"] == 1000
    assert op.params_from(found) == PruneParams(grid=(4, 4)).resolved()
    # the thresholds stay open to another ratio; the sinks are the family's
    assert Bundle.load(bundle()).manifest.params == PruneParams(grid=(4, 4), sink_positions=())


def test_prune_node_of_other_parameters(tmp_path):
    params = PruneParams(retention_ratio=0.25, merge_order="density", budget="exact", sink_positions=())
    write_prune(params, TensorSpec("features", "float16", ("F", 196, 896)), tmp_path)
    (node,) = proto(tmp_path, "prune").graph.node
    assert {a.name: a.type for a in node.attribute}["sink_positions"] == onnx.AttributeProto.INTS
    ratio = next(a for a in node.attribute if a.name == "retention_ratio")
    assert (ratio.type, ratio.i) == (onnx.AttributeProto.INT, 2500)


def test_a_weight_beyond_four_gigabytes_is_found(tmp_path):
    offset = 5 << 30
    with (tmp_path / "far.onnx.data").open("wb") as data:  # a hole: it takes no disk
        data.seek(offset)
        data.write(np.arange(4, dtype=np.float32).tobytes())
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    node = helper.make_node("Identity", ["w"], ["y"])
    weight = external_tensor("w", WeightSpec("float32", (4,), offset), "far.onnx.data")
    graph = helper.make_graph([node], "far", [], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "far.onnx")
    onnx.checker.check_model(str(tmp_path / "far.onnx"))
    assert run(tmp_path, "far")[0].tolist() == [0, 1, 2, 3]


def test_graphs_of_the_default_precision_are_fp16(bundle):
    assert {i.type for i in session(bundle() / "decoder.onnx").get_inputs()} == {"tensor(float16)", "tensor(int64)"}
    assert logits(bundle(), np.arange(3)).dtype == np.float32
    assert embed(bundle(), np.arange(3)).dtype == np.float16


def test_tensorrt_has_a_tower_of_its_own_on_the_same_weights(bundle):
    folder = bundle()
    plain, fused = (proto(folder, name) for name in ("vision", "vision.tensorrt"))
    for model, types in ((plain, {TensorProto.FLOAT}), (fused, {TensorProto.FLOAT16})):
        inferred = onnx.shape_inference.infer_shapes(model).graph
        kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *model.graph.input)}
        scores = [node for node in model.graph.node if node.name.endswith("self_attn.scores")]
        assert len(scores) == 2
        assert {kinds[name] for node in scores for name in node.input} == types
    stored = [{t.name: entries(t) for t in model.graph.initializer if t.external_data} for model in (plain, fused)]
    assert stored[0] == stored[1]
    specs = Bundle.load(folder, verify=True).manifest.graphs
    assert [spec.tensorrt for spec in specs.values()] == ["vision.tensorrt.onnx", None, None, None]
    assert not any(spec.tensorrt for spec in Bundle.load(bundle(precision="fp32")).manifest.graphs.values())


def test_the_tower_for_tensorrt_is_the_portable_one(bundle):
    folder, pixels = bundle(), frames(3)
    for found, wanted in zip(
        run(folder, "vision.tensorrt", frames=pixels), run(folder, "vision", frames=pixels), strict=True
    ):
        assert_close(found.astype(np.float64), wanted, 1e-2)
