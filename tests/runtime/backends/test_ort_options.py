"""INT8 products are exact on every CPU: what ONNX Runtime is asked, and by whom."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tango_calibration.quantization.replay import open_graph
from tango_calibration.quantization.stored import StoredGraph
from tango_runtime.backends import ort_options
from tango_runtime.backends.cuda.ort_runner import OrtRunner
from tango_runtime.backends.ort_cpu import open_session
from tango_runtime.backends.ort_options import PRODUCT, int8_saturates, session_options
from tango_runtime.bundle import Bundle
from tango_runtime.util.versions import release

KEY = "session.x64quantprecision"
K, N = 32, 24
QEMU = shutil.which("qemu-x86_64")


def int16_pairs(x, weights):
    """uint8 [M, K] · int8 [K, N] as AVX2 does it: sums of two products saturate at 16 bits, in NumPy."""
    products = x[:, :, None].astype(np.int32) * weights
    pairs = products[:, ::2] + products[:, 1::2]
    return np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum(1, dtype=np.int32)


def exact(x, weights):
    return x.astype(np.int32) @ weights.astype(np.int32)


@pytest.fixture
def weights():
    """int8 [K, N]: neighbors in a column are both large, of one sign."""
    return np.random.default_rng(0).choice([-127, -126, 126, 127], (K // 2, N)).astype(np.int8).repeat(2, 0)


def static(weights, *, activations=np.int8, stored=True):
    """y = x · weights with QuantizeLinear and DequantizeLinear on both sides, every scale 1."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["x.8"]),
        helper.make_node("DequantizeLinear", ["x.8", "x.scale", "x.zero"], ["x.back"]),
        helper.make_node("QuantizeLinear", ["w.fp32", "w.scale", "w.zero"], ["w.8"], axis=1),
        helper.make_node("DequantizeLinear", ["w.8", "w.scale", "w.zero"], ["w.back"], axis=1),
        helper.make_node("MatMul", ["x.back", "w.back"], ["y"]),
    ]
    values = {
        "x.scale": np.float32(1),
        "x.zero": np.array(0 if activations is np.int8 else 128, activations),
        "w.scale": np.ones(N, np.float32),
        "w.zero": np.zeros(N, np.int8),
    }
    if stored:
        del nodes[2]
        values["w.8"] = weights
    else:
        values["w.fp32"] = weights.astype(np.float32)
    return model(nodes, values)


def dynamic(weights):
    """The same with activations whose range is found as the graph runs."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["x.8", "x.scale", "x.zero"]),
        helper.make_node("MatMulInteger", ["x.8", "w.8", "x.zero", "w.zero"], ["y.32"]),
        helper.make_node("Cast", ["y.32"], ["y.fp32"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["y.fp32", "x.scale"], ["y"]),
    ]
    return model(nodes, {"w.8": weights, "w.zero": np.array(0, np.int8)})


def model(nodes, values):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", K])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", N])]
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


GRAPHS = {
    "as calibrated": static,
    "weights in fp32": lambda weights: static(weights, stored=False),
    "unsigned activations": lambda weights: static(weights, activations=np.uint8),
    "dynamic": dynamic,
}


def products(optimized):
    """Types and values of the stored matrices that a graph's integer products take."""
    graph = onnx.load(optimized).graph
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    kinds = "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"
    return [values[node.input[1]] for node in graph.node if node.op_type in kinds]


def can_saturate(weights):
    """Whether two neighbors of a column, times the largest uint8, leave int16."""
    return weights.dtype == np.int8 and bool(
        (np.abs(255 * (weights[::2].astype(np.int32) + weights[1::2])) > (1 << 15) - 1).any()
    )


def has_avx2():
    """Whether ONNX Runtime heeds the option here: where uint8 × int8 has another kernel than uint8 × uint8."""
    file = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and file.is_file() and " avx2 " in file.read_text()


@pytest.mark.skipif(not has_avx2(), reason="without AVX2 no kernel adds in 16 bits")
@pytest.mark.parametrize("form", GRAPHS)
@pytest.mark.parametrize("asked", [False, True])
def test_where_asked_no_product_can_saturate(weights, tmp_path, monkeypatch, form, asked):
    """By arithmetic on what ONNX Runtime makes of a graph, so it tells on a CPU with VNNI too."""
    if asked and release(onnxruntime.__version__) < (1, 24) and not int8_saturates():
        pytest.skip("ONNX Runtime 1.23 heeds the option only on a CPU whose products saturate; this one's do not")
    monkeypatch.setattr(ort_options, "int8_saturates", lambda: asked)
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(GRAPHS[form](weights).SerializeToString(), options)
    assert [can_saturate(found) for found in products(tmp_path / "optimized.onnx")] == [not asked]


@pytest.mark.parametrize("form", GRAPHS)
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_products_are_exact_here(weights, tmp_path, form, rows):
    file = tmp_path / "graph.onnx"
    onnx.save(GRAPHS[form](weights), file)
    x = np.random.default_rng(rows).choice([-128, 0, 127], (rows, K)).astype(np.float32)
    x[:, :2] = -128, 127  # the whole range, which a dynamic scale follows
    assert (open_session(file).run(None, {"x": x})[0] == x @ weights).all()


@pytest.mark.parametrize("threads", [0, 3])
def test_the_option_is_there_if_products_saturate(monkeypatch, threads):
    monkeypatch.setattr(ort_options, "int8_saturates", lambda: True)
    options = session_options(threads=threads)
    assert options.get_session_config_entry(KEY) == "1"
    assert options.intra_op_num_threads == threads
    monkeypatch.setattr(ort_options, "int8_saturates", lambda: False)
    with pytest.raises(RuntimeError, match=KEY):
        session_options().get_session_config_entry(KEY)


def test_every_session_has_the_option(weights, tiny_bundle, tmp_path, monkeypatch):
    given = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, graph, options, **more):
            given.append(options.get_session_config_entry(KEY))
            super().__init__(graph, options, **more)

    monkeypatch.setattr(ort_options, "int8_saturates", lambda: True)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    onnx.save(static(weights), tmp_path / "graph.onnx")
    open_session(tmp_path / "graph.onnx")
    open_graph(StoredGraph(Bundle.load(tiny_bundle), "embed"))
    OrtRunner(
        onnxruntime,
        Bundle.load(tiny_bundle),
        SimpleNamespace(handle=0, before_end=lambda end: None),
        ("CPUExecutionProvider", "cpu"),
    )
    assert given == ["1"] * 4


def test_the_probe_is_a_valid_graph():
    graph = onnx.load_from_string(PRODUCT)
    onnx.checker.check_model(graph)
    types = {t.name: t.type.tensor_type.elem_type for t in (*graph.graph.input, *graph.graph.output)}
    assert [node.op_type for node in graph.graph.node] == ["MatMulInteger"]
    assert types == {"x": TensorProto.UINT8, "w": TensorProto.INT8, "y": TensorProto.INT32}


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        (exact, False),
        (int16_pairs, True),
        (lambda x, w: (int16_pairs if len(x) == 1 else exact)(x, w), True),
        (lambda x, w: (int16_pairs if len(x) > 1 else exact)(x, w), True),
    ],
    ids=["exact", "saturating", "saturating for one row", "saturating for several"],
)
def test_the_probe_finds_kernels_that_saturate(monkeypatch, kernel, found):
    session = SimpleNamespace(run=lambda names, feeds: [kernel(feeds["x"], feeds["w"])])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *arguments, **options: session)
    assert int8_saturates.__wrapped__() is found


_ON_ANOTHER_CPU = """
import sys
from pathlib import Path
import numpy as np, onnxruntime
from tango_runtime.backends.ort_cpu import open_session
from tango_runtime.backends.ort_options import int8_saturates

file, x, wanted = sys.argv[1], *np.load(sys.argv[2]).values()
plain = onnxruntime.InferenceSession(file).run(None, {"x": x})[0]
print(int8_saturates(), (plain == wanted).all(), (open_session(Path(file)).run(None, {"x": x})[0] == wanted).all())
"""


@pytest.mark.skipif(QEMU is None or platform.machine() != "x86_64", reason="needs qemu-x86_64 (Debian: qemu-user)")
@pytest.mark.parametrize(
    ("cpu", "printed"),
    [("Haswell", "True False True"), ("EPYC-Milan", "True False True"), ("Nehalem", "False True True")],
)
def test_products_are_exact_on_other_cpus(weights, tmp_path, cpu, printed):
    """What is printed: whether products saturate there, and are right without and with our options."""
    onnx.save(static(weights), tmp_path / "graph.onnx")
    x = np.random.default_rng(0).choice([-128, 127], (8, K)).astype(np.float32)
    np.savez(tmp_path / "feeds.npz", x=x, wanted=x @ weights)
    script = [sys.executable, "-c", _ON_ANOTHER_CPU, tmp_path / "graph.onnx", tmp_path / "feeds.npz"]
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([QEMU, "-cpu", cpu, *script], capture_output=True, text=True, check=False, env=path)
    assert run.stdout.strip() == printed, run.stderr
