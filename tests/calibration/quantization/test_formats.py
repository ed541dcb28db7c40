"""Linear layers are written in another precision, in either form; everything else stays."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tango_calibration.quantization import formats
from tango_calibration.quantization.arithmetic import quantize_blocks, quantize_columns, smoothing
from tango_calibration.quantization.formats import Scheme, fused_quantizers, switches, takes
from tango_calibration.quantization.replay import open_written
from tango_export.graph import DEVICE, PORTABLE, Definition, build
from tango_export.graph.builder import Linear
from tango_export.graph.files import write_device, write_portable
from tango_export.graph.operators import FP8_OPSET
from tango_export.layers import gated_mlp, gelu_mlp, linear, rms_norm
from tango_runtime.backends.ort_options import session_options

WIDTH, INNER = 80, 48  # neither is a multiple of a block
GATE, UP, DOWN = NAMES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def gated(g):
    """A norm's gain, two layers after it, and a third after their product."""
    normed, _ = rms_norm(g, "norm", g.input("x", g.dtype, "N", WIDTH), WIDTH, 1e-6)
    g.output(gated_mlp(g, "mlp", normed, WIDTH, INNER).value, "y", g.dtype, "N", WIDTH)


def single(g, *, shape, tokens):
    y = linear(g, "a", g.input("x", g.dtype, *shape, WIDTH), WIDTH, INNER, bias=False, tokens=tokens)
    g.output(y.value, "y", g.dtype, *shape, INNER)


@pytest.fixture(scope="module")
def tensors():
    """The checkpoint: fp16, as its graph stores it."""
    rng = np.random.default_rng(0)
    shapes = {GATE: (INNER, WIDTH), UP: (INNER, WIDTH), DOWN: (WIDTH, INNER), "a": (INNER, WIDTH)}
    found = {f"{name}.weight": rng.normal(0, 0.1, shape).astype(np.float16) for name, shape in shapes.items()}
    gain = rng.uniform(0.5, 2, WIDTH).astype(np.float16)
    gain[3] *= 60  # an outlier, as norms have them
    return found | {"norm.weight": gain}


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).normal(size=(64, WIDTH)).astype(np.float16)


class Written:
    """A graph in a folder."""

    def __init__(self, folder, spec):
        self.folder, self.spec = folder, spec
        self.model = onnx.load(folder / spec.file)
        self.values = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer}

    def run(self, x):
        return open_written(self.folder, self.spec).run({"x": x})[0]


@pytest.fixture
def write(tensors, tmp_path):
    """``write(scheme, layers=…, dtype=…, read=…, form=…)``: a graph in the portable form of a scheme, or in another."""

    def made(scheme=None, layers=gated, dtype="float16", read=tensors.__getitem__, form=None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        form = form or (scheme.portable() if scheme else PORTABLE)
        graph = build(Definition("decoder", layers, {}), form, dtype)
        return Written(folder, write_portable(graph, read, folder, lambda done: None))

    return made


@pytest.fixture(scope="module")
def inputs(tensors, x):
    """What the layers take, by layer."""
    wide = x.astype(np.float32)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * tensors["norm.weight"]
    gate, up = (normed @ tensors[f"{name}.weight"].T.astype(np.float32) for name in (GATE, UP))
    return {GATE: normed, UP: normed, DOWN: gate / (1 + np.exp(-gate)) * up}


def ranges_of(inputs, by=None):
    return {name: float(np.abs(values / (by or {}).get(name, 1)).max()) for name, values in inputs.items()}


@pytest.fixture(scope="module")
def w8a8(inputs):
    return Scheme(dict.fromkeys(NAMES, "w8a8"), ranges_of(inputs))


def error(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(a)


def test_w8a8_is_symmetric_per_channel_opset_17_and_close(write, w8a8, x):
    found = write(w8a8)
    assert [(o.domain, o.version) for o in found.model.opset_import] == [("", 17)]
    pairs = [node for node in found.model.graph.node if "Linear" in node.op_type]
    assert len(pairs) == 3 * 3
    for node in pairs:
        scale, zero = found.values[node.input[1]], found.values[node.input[2]]
        assert scale.dtype == np.float32
        assert (scale > 0).all()
        assert zero.dtype == np.int8
        assert not zero.any()
    assert found.values[f"{GATE}.weight.scale"].shape == (INNER,)
    quantized = [node.input[0] for node in pairs if node.op_type == "QuantizeLinear"]
    assert quantized == ["norm.scaled", "norm.scaled", f"{DOWN}.input.fp32"]  # the fp32 tensor where there is one
    assert error(write().run(x), found.run(x)) < 0.1


@pytest.mark.parametrize("float_weights", [False, True])
def test_w8a8_runs_as_integers(write, w8a8, tmp_path, float_weights):
    """Also where two layers quantize one input with one scale."""
    found = write(replace(w8a8, float_weights=float_weights))
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    file = str(found.folder / found.spec.file)
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 3
    assert "MatMul" not in kinds


def test_float_weights_give_the_same_results(write, w8a8, x):
    """TensorRT 8 reads no stored int8: a float weight has its own Q/DQ pair."""
    compact, wide = write(w8a8), write(replace(w8a8, float_weights=True))
    assert (compact.run(x) == wide.run(x)).all()
    assert {name for name, values in wide.values.items() if values.dtype == np.int8} == {
        f"{name}.{kind}" for name in NAMES for kind in ("input.zero", "weight.zero")
    }
    made = {node.output[0]: node for node in wide.model.graph.node}
    for node in [node for node in wide.model.graph.node if node.op_type == "MatMul"]:
        dequantize = made[node.input[1]]
        quantize = made[dequantize.input[0]]
        assert [dequantize.op_type, quantize.op_type] == ["DequantizeLinear", "QuantizeLinear"]
        assert dequantize.input[1:] == quantize.input[1:]
        assert wide.values[quantize.input[0]].dtype == np.float32


def test_fp8_is_fp16_at_its_opset_and_close(write, inputs, x):
    plain, found = write(), write(Scheme(dict.fromkeys(NAMES, "fp8"), ranges_of(inputs)))
    assert [(o.domain, o.version) for o in found.model.opset_import] == [("", FP8_OPSET)]
    for node in found.model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = (found.values[name].dtype for name in node.input[1:])
            assert (scale, zero) == (np.float16, ml_dtypes.float8_e4m3fn)
    assert found.spec.weights[f"{GATE}.weight.fp8"].dtype == "float8_e4m3fn"
    casts = [sum(n.op_type == "Cast" for n in each.model.graph.node) for each in (plain, found)]
    assert casts[0] == casts[1]
    with np.errstate(all="ignore"):  # its Sigmoid overflows harmlessly
        reference = ReferenceEvaluator(found.model).run(None, {"x": x})[0]
    assert error(plain.run(x), reference) < 0.1
    assert error(reference, found.run(x)) < 0.01  # ONNX Runtime's kernels agree


class OnDevice:
    """A graph in the device form of a scheme, on the data file of its portable form, by ONNX functions on a CPU."""

    def __init__(self, written, scheme, layers, read):
        graph = fused_quantizers(build(Definition("decoder", layers, {}), scheme.device(), "float16"))
        self.spec = write_device(graph, written.spec, read, written.folder).device
        self._weights, self._data = written.spec.weights, written.folder / written.spec.data
        self._file = str(written.folder / self.spec.file)
        self.nodes = onnx.load(self._file).graph.node

    def run(self, x):
        session = onnxruntime.InferenceSession(self._file, session_options(), providers=["CPUExecutionProvider"])
        feeds = {"x": onnxruntime.OrtValue.ortvalue_from_numpy(x)}
        for tensor in self.spec.inputs[1:]:
            stored = self._weights[tensor.name]
            values = np.fromfile(self._data, np.uint8, stored.end - stored.offset, offset=stored.offset)
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(stored.dtype))
            values = values.view(np.uint8 if stored.dtype == "float8_e4m3fn" else stored.dtype).reshape(stored.shape)
            feeds[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values, kind)
        return session.run_with_ort_values(None, feeds)[0].numpy()


#: Forms of 8-bit activations, with the ends of the names of their operators and weights, and the opset of their graphs.
EIGHT_BITS = [("w8a8", "Int8", "int8", 17), ("fp8", "Fp8", "fp8", FP8_OPSET)]


@pytest.mark.parametrize(("form", "kind", "suffix", "opset"), EIGHT_BITS)
def test_8_bit_activations_on_a_device_have_the_same_weights_and_results(
    write, tensors, inputs, x, form, kind, suffix, opset
):
    """Gate and up take one input, which the norm writes in 8 bits; the down projection's comes from the activation."""
    scheme = Scheme(dict.fromkeys(NAMES, form), ranges_of(inputs))
    portable = write(scheme)
    device = OnDevice(portable, scheme, gated, tensors.__getitem__)
    product = f"{kind}Linear"
    assert [node.op_type for node in device.nodes] == [f"RMSNorm{kind}", product, product, f"SwiGLU{kind}", product]
    assert (device.spec.runtimes, device.spec.opset) == (("onnxruntime",), opset)
    taken = {tensor.name for tensor in device.spec.inputs}
    assert {f"{name}.weight.{suffix}" for name in NAMES} <= taken
    assert error(portable.run(x), device.run(x)) < (0.02 if form == "fp8" else 0.01)


@pytest.mark.parametrize(("form", "kind"), [each[:2] for each in EIGHT_BITS])
@pytest.mark.parametrize(
    ("chosen", "kinds"),
    [
        (("mlp.fc1", "mlp.fc2"), ["Quantize*", "*Linear", "BiasFastGelu*", "*Linear", "Bias"]),
        (("mlp.fc1",), ["Quantize*", "*Linear", "BiasFastGelu", "Linear", "Bias"]),
        ((), ["LinearGelu", "Linear", "Bias"]),
        (("mlp.fc2",), ["Linear", "BiasFastGelu*", "*Linear", "Bias"]),
    ],
)
def test_a_gelu_writes_8_bits(write, form, kind, chosen, kinds):
    """Between two layers of fp16 or FP8 it is part of the first."""
    rng = np.random.default_rng(0)
    shapes = {"fc1.weight": (INNER, WIDTH), "fc1.bias": INNER, "fc2.weight": (WIDTH, INNER), "fc2.bias": WIDTH}
    tensors = {f"mlp.{name}": rng.normal(0, 0.2, shape).astype(np.float16) for name, shape in shapes.items()}
    x = rng.normal(size=(3, 4, WIDTH)).astype(np.float16)

    def layers(g):
        mlp = gelu_mlp(g, "mlp", g.input("x", g.dtype, "F", 4, WIDTH), 4, WIDTH, INNER)
        g.output(g.form.add_bias(g, mlp), "y", g.dtype, "F", 4, WIDTH)

    scheme = Scheme(dict.fromkeys(chosen, form), {"mlp.fc1": 4.0, "mlp.fc2": 7.0})
    portable = write(scheme, layers=layers, read=tensors.__getitem__)
    device = OnDevice(portable, scheme, layers, tensors.__getitem__)
    wanted = [name.replace("*", kind) for name in kinds]
    if (form, len(chosen)) == ("fp8", 2):
        wanted[1:3] = ["Fp8LinearGelu"]
    assert [node.op_type for node in device.nodes] == wanted
    assert error(portable.run(x), device.run(x)) < 0.02


@pytest.mark.parametrize(("form", "kind"), [each[:2] for each in EIGHT_BITS])
def test_an_input_that_others_read_too_is_quantized_apart(write, tensors, inputs, x, form, kind):
    """The gate stays in fp16, so the norm writes what it reads, and the up projection's quantizer follows."""
    scheme = Scheme({UP: form}, ranges_of(inputs))
    device = OnDevice(write(scheme), scheme, gated, tensors.__getitem__)
    kinds = [node.op_type for node in device.nodes]
    assert kinds == ["RMSNorm", "Linear", f"Quantize{kind}", f"{kind}Linear", "SwiGLU", "Linear"]


@pytest.mark.parametrize("width", [WIDTH + 8, WIDTH])
def test_fp8_takes_multiples_of_16(width):
    assert takes("fp8", Linear("a", "x", "y", width, 32)) == takes("fp8", Linear("a", "x", "y", 32, width))
    assert takes("fp8", Linear("a", "x", "y", width, 32)) == (width % 16 == 0)
    assert takes("w8a8", Linear("a", "x", "y", width, 32))


@pytest.mark.parametrize(("shape", "tokens", "rank"), [(("F", 4), 4, 2), (("F", "T"), None, 3), (("N",), None, 2)])
def test_a_product_of_a_higher_rank_becomes_a_matrix_product(write, x, shape, tokens, rank):
    """If the layer says how many tokens there are; otherwise the product stays as it is."""
    layers = partial(single, shape=shape, tokens=tokens)
    frames = x.reshape(*[-1, 4][: len(shape)], WIDTH)
    plain, found = (write(scheme, layers) for scheme in (None, Scheme({"a": "w8a8"}, {"a": float(np.abs(x).max())})))
    inferred = onnx.shape_inference.infer_shapes(found.model).graph.value_info
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in inferred}
    assert ranks["a.product"] == rank
    expected, got = (each.run(frames) for each in (plain, found))
    assert expected.shape == got.shape == (*frames.shape[:-1], INNER)
    assert error(expected, got) < 0.02


def test_a_fp32_graph_needs_no_casts(write, w8a8, x):
    plain, found = (write(scheme, dtype="float32") for scheme in (None, w8a8))
    assert not any(node.op_type == "Cast" for node in found.model.graph.node)
    wide = x.astype(np.float32)
    assert error(plain.run(wide), found.run(wide)) < 0.1


@pytest.mark.parametrize(("form", "bits", "most"), [("w4a16", 4, 0.15), ("w8a16", 8, 0.03)])
def test_blocks_run_with_small_error(write, x, form, bits, most):
    found = write(Scheme(dict.fromkeys(NAMES, form)))
    assert ("com.microsoft", 1) in [(o.domain, o.version) for o in found.model.opset_import]
    blocks = [n for n in found.model.graph.node if n.op_type == "MatMulNBits"]
    assert [helper.get_node_attr_value(n, "bits") for n in blocks] == [bits] * 3
    assert error(write().run(x), found.run(x)) < most


def test_only_chosen_layers_change(write):
    plain, found = write(), write(Scheme({DOWN: "w4a16"}))
    before, after = ({n.name: n for n in each.model.graph.node} for each in (plain, found))
    assert {name for name in before if before[name] != after.get(name)} == {DOWN}
    assert before.keys() == after.keys()
    kept = plain.values.keys() & found.values.keys()
    assert plain.values.keys() - kept == {f"{DOWN}.weight"}
    assert all((plain.values[name] == found.values[name]).all() for name in kept)


def test_bundle_json_says_how_weights_are_read(write, w8a8, tensors, x):
    scheme = replace(w8a8, formats={GATE: "w8a8", UP: "w4a16", DOWN: "w8a16"})
    found = write(scheme)
    for name, suffix, bits in ((GATE, "int8", 8), (UP, "int4", 4), (DOWN, "int8", 8)):
        stored = found.spec.weights[f"{name}.weight.{suffix}"]
        layout, scales = stored.quantization, found.values[stored.quantization.scales].astype(np.float32)
        values = found.values[f"{name}.weight.{suffix}"]
        assert (layout.bits, stored.dtype, stored.shape) == (bits, values.dtype.name, values.shape)
        if layout.group_size:  # [out, groups, bytes], unsigned
            elements = np.stack([values >> shift & 2**bits - 1 for shift in range(0, 8, bits)], -1)
            elements = elements.reshape(*scales.shape, layout.group_size).astype(np.float32) - 2 ** (bits - 1)
            numbers = (elements * scales[..., None]).reshape(len(scales), -1)[:, : tensors[f"{name}.weight"].shape[1]]
        else:
            numbers = (values * scales).T
        assert error(tensors[f"{name}.weight"], numbers) < (0.01 if bits == 8 else 0.12)


def test_a_switch_says_whether_a_layer_is_quantized(write, w8a8, x):
    """Without a trace of the other way, so that one session weighs several layers."""
    scheme = replace(w8a8, formats={GATE: "w8a8", DOWN: "w8a8"})
    both = write(scheme, form=scheme.switched())
    alone = {name: write(replace(scheme, formats={name: "w8a8"})) for name in scheme.formats}
    for name, expected in {**alone, "": write()}.items():
        found = open_written(both.folder, both.spec).given(switches(scheme.formats, name)).run({"x": x})[0]
        assert (found == expected.run(x)).all()


# Smoothing


@pytest.fixture(scope="module")
def factors(inputs):
    s = smoothing(np.abs(inputs[GATE]).max(0), np.full(WIDTH, 0.3, np.float32))
    assert (np.log2(s) % 1 == 0).all()
    assert s[3] == s.max() > 1
    return {GATE: s, UP: s, DOWN: np.exp2(np.arange(INNER) % 5 - 2).astype(np.float32)}


def folded(tensors, factors):
    """Reads the checkpoint with smoothing in its weights."""
    changed = {name: values.astype(np.float32) for name, values in tensors.items()}
    for name, s in factors.items():
        changed[f"{name}.weight"] *= s
    changed["norm.weight"] /= factors[GATE]
    changed[f"{UP}.weight"] /= factors[DOWN][:, None]
    return lambda name: changed[name].astype(np.float16)


def test_smoothing_in_front_of_a_layer_is_smoothing_of_all_weights(write, inputs, tensors, factors, x):
    """So that one layer can be weighed without new weights for the others."""
    scheme = Scheme(dict.fromkeys(NAMES, "w8a8"), ranges_of(inputs, factors), factors)
    front, all_weights = write(scheme), write(replace(scheme, smoothing={}), read=folded(tensors, factors))
    assert (front.run(x) == all_weights.run(x)).all()
    for name in (GATE, DOWN):
        assert (front.values[f"{name}.weight.int8"] == all_weights.values[f"{name}.weight.int8"]).all()


def test_smoothing_helps_against_outliers(write, inputs, factors, x):
    layers = {GATE: "w8a8", UP: "w8a8"}
    plain, smooth = (
        write(scheme)
        for scheme in (Scheme(layers, ranges_of(inputs)), Scheme(layers, ranges_of(inputs, factors), factors))
    )
    expected = write().run(x)
    assert error(expected, smooth.run(x)) < 0.8 * error(expected, plain.run(x))


# Scaled inputs


def test_weights_in_blocks_take_a_scaled_input(write, tensors, x):
    """As a layer that is weighed alone has it: its input is divided in front of it."""
    factors = np.exp2(np.random.default_rng(2).normal(size=WIDTH)).astype(np.float32)
    plain = Scheme({"a": "w4a16"}, mean_squares={"a": np.ones(WIDTH)})
    scaled = plain.scaled({"a": factors})
    np.testing.assert_allclose(scaled.mean_squares["a"], factors**-2.0, rtol=1e-5)
    layer = partial(single, shape=("N",), tokens=None)
    found = write(scaled, layers=layer)
    assert [node.op_type for node in found.model.graph.node] == ["Mul", "MatMulNBits"]
    packed, _ = quantize_blocks(tensors["a.weight"].T * factors[:, None], 4, factors**-2.0)
    assert (found.values["a.weight.int4"] == packed).mean() > 0.99  # the product is in fp16 there
    assert error(write(layers=layer).run(x), found.run(x)) < 0.3


# The device form


@pytest.fixture
def device(write, tensors):
    """``device(scheme)``: the graph in both forms, on one data file; the device form runs on the CPU's kernels."""

    def made(scheme, layers=gated):
        portable = write(scheme, layers)
        graph = build(Definition("decoder", layers, {}), scheme.device(), "float16")
        spec = write_device(graph, portable.spec, tensors.__getitem__, portable.folder)
        file, options = str(portable.folder / spec.device.file), session_options()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        taken = {tensor.name: portable.values[tensor.name] for tensor in spec.device.inputs[1:]}
        return portable, onnx.load(file), lambda x: session.run(None, {"x": x, **taken})[0]

    return made


@pytest.mark.parametrize(
    ("form", "operator", "suffix"),
    [
        ("w8a8", "Int8Linear", "int8"),
        ("w8a16", "BlockwiseLinear", "int8"),
        ("w4a16", "BlockwiseLinear", "int4"),
    ],
)
def test_the_device_form_is_one_operator_on_the_same_weights(device, w8a8, x, form, operator, suffix):
    portable, model, run = device(replace(w8a8, formats=dict.fromkeys(NAMES, form)))
    assert [n.op_type for n in model.graph.node].count(operator) == 3
    assert [f.name for f in model.functions].count(operator) == 1
    inputs = [value.name for value in model.graph.input][1:]
    assert set(inputs) == {"norm.weight", *(f"{name}.weight.{kind}" for name in NAMES for kind in (suffix, "scale"))}
    assert [node.op_type for node in model.graph.node].count("QuantizeInt8") == (2 if form == "w8a8" else 0)
    assert error(portable.run(x), run(x)) < 0.03  # the portable form's blocks also round activations to 8 bits


@pytest.mark.parametrize("shape", [("N",), (1, "N"), ("F", 4)])
@pytest.mark.parametrize("form", ["w8a8", "w8a16", "w4a16"])
def test_the_device_forms_operator_multiplies_by_the_quantized_weight(device, tensors, x, form, shape):
    weight = tensors["a.weight"].T
    batch = x.reshape(*[1 if n == 1 else 4 if n == 4 else -1 for n in shape], WIDTH)
    rows = batch.astype(np.float32)
    if form == "w8a8":
        values, steps = quantize_columns(weight)
        step = np.float32(1 / 127)
        rows, numbers = np.clip(np.rint(rows / step), -128, 127) * step, values * steps
    else:
        bits = int(form[1])
        packed, steps = quantize_blocks(weight, bits)
        elements = np.stack([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)], -1)
        elements = elements.reshape(*steps.shape, -1).astype(np.float32) - 2 ** (bits - 1)
        numbers = (elements * steps[..., None]).reshape(INNER, -1)[:, :WIDTH].T
        numbers = numbers.astype(np.float16).astype(np.float32)
    _, _, run = device(Scheme({"a": form}, {"a": 1.0}), partial(single, shape=shape, tokens=None))
    expected = rows @ numbers
    np.testing.assert_allclose(run(batch), expected, rtol=2e-3, atol=2e-3)


def test_layers_that_stay_are_as_in_the_plain_device_form(device, w8a8):
    _, model, _ = device(replace(w8a8, formats={UP: "w8a8"}))
    plain = {node.name: node for node in build(Definition("decoder", gated, {}), DEVICE, "float16").nodes}
    assert [node.name for node in model.graph.node if node != plain.get(node.name)] == ["norm.int8", UP]


# Files


def test_weights_are_quantized_once(write, device, w8a8, monkeypatch):
    counted = []
    monkeypatch.setattr(formats, "quantize_columns", lambda *args: counted.append(1) or quantize_columns(*args))
    device(w8a8)
    assert len(counted) == 3


@pytest.mark.parametrize("form", ["w8a8", "w4a16", "fp8"])
def test_twice_the_same_bytes(write, w8a8, form):
    first, second = (write(replace(w8a8, formats=dict.fromkeys(NAMES, form))) for _ in range(2))
    for file in (first.spec.file, first.spec.data):
        assert (first.folder / file).read_bytes() == (second.folder / file).read_bytes()


def test_a_scalar_stays_a_scalar(write, w8a8):
    """TensorRT's parser aborts on a Range whose limits are vectors of one element."""
    found = write(w8a8)
    scalars = [t for t in found.model.graph.initializer if not t.dims]
    assert {t.data_type for t in scalars} == {TensorProto.FLOAT, TensorProto.INT8}
    assert f"{GATE}.input.zero" in {t.name for t in scalars}
