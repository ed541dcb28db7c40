"""The device graphs against the portable ones, by the ONNX functions of their operators on the CPU."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper

from tango_export.export import Request, export
from tango_export.graph import DEVICE, Graph
from tango_export.graph.builder import Weight
from tango_export.graph.fused import fused_gelus
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main
from tests.export.edits import Decoder, assert_close, embed, frames, run, session
from tests.fakes.device_graphs import with_device_graphs

IDS = np.random.default_rng(3).integers(0, 300, 12)
CONTEXT, CAPACITY = 8192, 256

#: Of the largest magnitude. In fp16 the query is rounded after its rotation, and so are the cosines and sines.
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2}


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def written(request, bundle, tmp_path_factory):
    """A bundle with device graphs, and the precision."""
    precision, outliers = request.param, request.param == "fp16"
    source = bundle(precision=precision, outliers=outliers)
    folder = with_device_graphs(source, tmp_path_factory.mktemp("device") / precision, precision)
    return folder, precision


def weights(folder, graph):
    """What the device graph takes of the portable one's data file."""
    spec = Bundle.load(folder).manifest.graphs[graph]
    return {n: np.memmap(folder / spec.data, w.dtype, "r", w.offset, w.shape) for n, w in spec.device_weights.items()}


class DeviceDecoder:
    """The device decoder and its cache, which holds garbage where it is not filled."""

    def __init__(self, bundle, capacity=CAPACITY):
        self.session, self.length = session(bundle / "decoder.device.onnx"), 0
        rng, self.weights = np.random.default_rng(0), weights(bundle, "decoder")
        self.dtype = embed(bundle, IDS[:1]).dtype
        self.cache = {
            t.name: (rng.normal(size=(t.shape[0], capacity, t.shape[2])) * 1e3).astype(self.dtype)
            for t in self.session.get_inputs()[2:]
            if t.name not in self.weights
        }

    def step(self, embeddings):
        self.length += len(embeddings)
        feeds = {"embeddings": embeddings, "last_position": np.array([self.length - 1], np.int32)}
        logits, *present = self.session.run(None, {**feeds, **self.cache, **self.weights})
        self.cache = dict(zip(self.cache, present, strict=True))
        return logits


def test_vision_is_the_portable_graphs(written):
    folder, precision = written
    feeds = {"frames": frames(3), **weights(folder, "vision")}
    for found, wanted in zip(
        run(folder, "vision.device", **feeds), run(folder, "vision", frames=frames(3)), strict=True
    ):
        assert_close(found.astype(np.float64), wanted, TOLERANCE[precision])


def test_embedding_is_the_portable_graphs(written):
    folder, _ = written
    (found,) = run(folder, "embed.device", ids=IDS, **weights(folder, "embed"))
    np.testing.assert_array_equal(found, embed(folder, IDS))


@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (7, 5), (2, 3, 7), (11, 1)])
def test_logits_are_the_portable_graphs(written, chunks):
    folder, precision = written
    portable, device, begin = Decoder(folder, 0), DeviceDecoder(folder), 0
    wanted = portable.step(embed(folder, IDS))
    for n in chunks:
        found, begin = device.step(embed(folder, IDS[begin : begin + n])), begin + n
    assert_close(found, wanted, TOLERANCE[precision])


def test_what_was_rewound_does_not_count(written):
    folder, _ = written
    decoder = DeviceDecoder(folder)
    decoder.step(embed(folder, IDS[:6]))
    first = decoder.step(embed(folder, IDS[6:9]))
    decoder.step(embed(folder, IDS[9:]))
    decoder.length = 6
    np.testing.assert_array_equal(decoder.step(embed(folder, IDS[6:9])), first)


def test_sixty_four_tokens_are_the_portable_graphs(written):
    folder, precision = written
    portable, device = Decoder(folder, CAPACITY), DeviceDecoder(folder)
    rows, found = portable.step(embed(folder, IDS)), device.step(embed(folder, IDS))
    for _ in range(64):
        assert_close(found, rows, 3 * TOLERANCE[precision])
        token = embed(folder, np.array([rows.argmax()]))
        rows, found = portable.step(token), device.step(token)


@pytest.mark.parametrize("graph", ["vision", "embed", "decoder"])
def test_tensorrt_8_reads_its_shapes(written, graph):
    """Its parser knows no part of a shape (opset 15): it takes the whole one in silence."""
    folder, _ = written
    for file in (f"{graph}.device.onnx", f"{graph}.onnx"):
        nodes = onnx.load(folder / file, load_external_data=False).graph.node
        assert not [node.name for node in nodes if node.op_type == "Shape" and node.attribute]


def test_every_layer_is_fused_and_nothing_is_left(written):
    folder, _ = written
    decoder = Bundle.load(folder).manifest.decoder
    for name, attention, norm in (
        ("decoder", "CachedAttention", "AddRMSNorm"),
        ("vision", "VisionAttention", "AddLayerNorm"),
    ):
        model = onnx.load(folder / f"{name}.device.onnx", load_external_data=False)
        kinds = Counter(node.op_type for node in model.graph.node)
        assert kinds[attention] == 2
        assert kinds[norm] == 2 * decoder.layers
        assert not kinds.keys() & {"Range", "Where", "Tanh", "Erf", "Sigmoid", "Sqrt"}
        assert kinds["Shape"] == kinds["Concat"] == kinds["Expand"] == 2 * (name == "vision")
        assert kinds["Softmax"] == (name == "vision")  # the pooling head's, whose weights are the salience


def test_no_product_repeats_a_constant_by_itself(written):
    """Its pointers would lie in pinned memory, which ONNX Runtime frees where CUDA forbids it."""
    folder, _ = written
    model = onnx.load(folder / "vision.device.onnx", load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert not [node.name for node in products if node.input[0] in constants]


@pytest.mark.parametrize(("name", "op"), [("decoder", "CachedAttention"), ("vision", "VisionAttention")])
def test_query_key_and_value_are_one_product(written, name, op):
    folder, precision = written
    model = onnx.load(folder / f"{name}.device.onnx", load_external_data=False)
    makers = {name: node for node in model.graph.node for name in node.output}
    attentions = [node for node in model.graph.node if node.op_type == op]
    assert {makers[node.input[0]].op_type for node in attentions} == {"MatMul" if precision == "fp32" else "Linear"}
    assert all(node.input[1].endswith("qkv_proj.bias") for node in attentions)


@pytest.mark.parametrize(
    ("name", "others"), [("decoder", set()), ("vision", {"projector.pool", "pool", "salience.scores"})]
)
def test_products_by_a_stored_matrix_are_operators_in_fp16(written, name, others):
    folder, precision = written
    nodes = onnx.load(folder / f"{name}.device.onnx", load_external_data=False).graph.node
    products = {node.name for node in nodes if node.op_type == "MatMul"}
    linears = [node for node in nodes if node.op_type in ("Linear", "LinearGelu")]
    assert (products == others) == (precision == "fp16")
    assert {node.input[1] for node in linears} <= set(weights(folder, name))
    assert sum(node.op_type == "LinearGelu" for node in linears) == 2 * (name == "vision" and precision == "fp16")


@pytest.mark.parametrize(("widths", "ops"), [((16, 24), ["LinearGelu"]), ((16, 12), ["Linear", "BiasFastGelu"])])
def test_a_gelu_is_in_a_product_of_the_widths_that_its_kernel_takes(widths, ops):
    product = helper.make_node("Linear", ["x", "weight"], ["product"], "product", domain="tango")
    gelu = helper.make_node("BiasFastGelu", ["product", "bias"], ["y"], "y", domain="tango")
    weights = tuple(
        Weight(name, shape, "float16", {}, None) for name, shape in (("weight", widths), ("bias", widths[1:]))
    )
    graph = fused_gelus(Graph("vision", DEVICE, (), (), (product, gelu), (), weights))
    assert [node.op_type for node in graph.nodes] == ops


@pytest.mark.parametrize("name", ["vision", "embed", "decoder"])
def test_they_are_standard_onnx_and_our_operators_each_with_a_function(written, name):
    folder, _ = written
    model = onnx.load(folder / f"{name}.device.onnx", load_external_data=False)
    assert {opset.domain for opset in model.opset_import} <= {"", "tango"}
    own = {node.op_type for node in model.graph.node if node.domain}
    assert {(f.domain, f.name) for f in model.functions} == {("tango", op) for op in own}
    assert not [node.op_type for function in model.functions for node in function.node if node.domain]


@pytest.mark.parametrize("name", ["vision", "embed", "decoder"])
def test_they_take_their_weights_as_inputs_behind_the_others(written, name):
    folder, _ = written
    files = folder / f"{name}.onnx", folder / f"{name}.device.onnx"
    portable, device = (onnx.load(file, load_external_data=False) for file in files)
    spec = Bundle.load(folder).manifest.graphs[name]
    inputs = [t.name for t in spec.device.inputs]
    assert [value.name for value in device.graph.input] == inputs
    assert inputs[-len(spec.device_weights) :] == list(spec.device_weights)
    stored = {t.name: (tuple(t.dims), t.external_data[1].value) for t in portable.graph.initializer if t.external_data}
    assert stored == {weight: (at.shape, str(at.offset)) for weight, at in spec.weights.items()}
    # Only the frequencies are left: the graph has tables of the angles, the kernel that decodes computes them.
    assert spec.weights.keys() - spec.device_weights.keys() == ({"rotary.inv_freq"} if name == "decoder" else set())
    kept = {t.name for t in device.graph.initializer if np.prod(t.dims) > 1000}
    assert kept == ({"rotary.cos", "rotary.sin"} if name == "decoder" else set())
    assert not any(t.external_data for t in device.graph.initializer)


def test_fp16_bundles_have_them_and_fp32_bundles_do_not(bundle):
    sixteen, thirty_two = (Bundle.load(bundle(precision=precision)).manifest.graphs for precision in ("fp16", "fp32"))
    assert {name for name, spec in sixteen.items() if spec.device} == {"vision", "embed", "decoder"}
    assert not any(spec.device for spec in thirty_two.values())
    for graphs in (sixteen, thirty_two):
        assert {name for name, spec in graphs.items() if spec.weights} == {"vision", "embed", "decoder"}


def negate_sines(model):
    tensor = next(t for t in model.graph.initializer if t.name == "rotary.sin")
    tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))


def merge_heads(model):
    for node in model.graph.node:
        if node.op_type == "VisionAttention":
            node.attribute[0].i = 1


def test_validate_compares_them_with_the_original(bundle, tmp_path, capsys):
    path = shutil.copytree(bundle(), tmp_path / "bundle")
    assert main(["validate", str(path)]) == 0
    assert "18 of 18 within the limits" in capsys.readouterr().out
    for graph, spoil in (("decoder", negate_sines), ("vision", merge_heads)):
        file = path / f"{graph}.device.onnx"
        sound, model = file.read_bytes(), onnx.load(file, load_external_data=False)
        spoil(model)
        onnx.save(model, file)
        assert main(["validate", str(path)]) == 1
        failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
        assert failed
        assert all(line.startswith(f"{graph} (device)") for line in failed)
        file.write_bytes(sound)


@pytest.mark.parametrize("shape", [{"heads": 8, "kv_heads": 2}, {"intermediate": 104}])
def test_a_decoder_whose_widths_the_kernel_cannot_take_has_none(checkpoint, tmp_path, capsys, shape):
    llava, siglip = checkpoint(**shape)
    output = export(Request(checkpoint=str(llava), salience=str(siglip), output=tmp_path / "out"))
    graphs = Bundle.load(output, verify=True).manifest.graphs
    assert "decoder has no device graph: a width is no multiple of 16" in capsys.readouterr().err
    assert {name for name, spec in graphs.items() if spec.device} == {"vision", "embed"}


def test_a_tower_whose_heads_the_kernel_cannot_take_has_none(checkpoint, tmp_path, capsys):
    llava, siglip = checkpoint(vision_heads=2)
    output = export(Request(checkpoint=str(llava), salience=str(siglip), output=tmp_path / "out"))
    graphs = Bundle.load(output).manifest.graphs
    assert "vision has no device graph: its heads are 36 wide, no multiple of 8" in capsys.readouterr().err
    assert {name for name, spec in graphs.items() if spec.device} == {"embed", "decoder"}
