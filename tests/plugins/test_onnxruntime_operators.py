"""The custom operators in ONNX Runtime, with their kernels in the CUDA emulator."""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper

from tango_export.graph.operators import FP8_FUNCTIONS, FUNCTIONS
from tango_plugins.native_library import NATIVE
from tests.plugins.attentions import Pass, Shape
from tests.plugins.cuda_emulator import compiled
from tests.plugins.matrices import FORMATS, INTERLEAVED, quantized
from tests.plugins.operators import (
    FLOAT,
    HALF,
    RNG,
    ROWS,
    example,
    linear,
    open_graph,
    pixels,
    random,
    rotated,
    rotation,
    wide_norm,
    windows,
)

pytestmark = pytest.mark.nvcc

#: The library in full, but for what decodes and prunes.
PARTS = ("attention", "vision", "rotation", "patches", "norm", "activation", "linear", "products")
PARTS = (*PARTS, "operators", "onnxruntime")


FP8 = np.dtype(ml_dtypes.float8_e4m3fn)

#: Those with weights in fp16.
LINEARS = ("Linear", "LinearGelu")
#: Those with quantized weights.
PRODUCTS = ("PerChannelLinear", "BlockwiseLinear", "BlockwiseAffineLinear")

#: The types that results are quantized to, by the end of an operator's name.
QUANTIZED = {"Fp8": FP8, "Int8": np.dtype(np.int8)}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("operators"), *PARTS)


def compare(library, op, inputs, outputs, attributes, tolerance):
    found, wanted = (open_graph(op, inputs, outputs, path, **attributes).run(None, inputs) for path in (library, None))
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a.astype(np.float64), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(FLOAT, 5e-6), (HALF, 5e-3)])
@pytest.mark.parametrize("shape", [(5,), (3, 8), (2, 3, 17), (0, 4)])
def test_it_equals_its_onnx_function(library, op, shape, dtype, tolerance):
    compare(library, op, *example(op, dtype, shape), tolerance)


@pytest.mark.parametrize("op", ["AddLayerNorm", "AddRMSNorm"])
def test_the_residual_stream_may_be_wider(library, op):
    compare(library, op, *example(op, HALF, (3, 24), FLOAT), 5e-3)


@pytest.mark.parametrize(("shape", "heads"), [((2, 9, 3 * 64), 1), ((1, 30, 3 * 144), 2), ((3, 70, 3 * 80), 1)])
def test_attention_of_a_tower_equals_its_onnx_function(library, shape, heads):
    inputs = {"qkv": random(HALF, *shape), "bias": random(HALF, shape[-1])}
    compare(library, "VisionAttention", inputs, {"y": (HALF, 3)}, {"num_heads": heads}, 1e-2)


@pytest.mark.parametrize("shape", [(5,), (3, 8), (2, 3, 17), (0, 4), (3, 1280)])
@pytest.mark.parametrize("types", [(None, None), (HALF, HALF), (HALF, FLOAT)])
def test_the_norm_of_an_fp32_stream_equals_its_onnx_function(library, shape, types):
    """With an fp32 bias the branch, times its scale, is far beyond what fp16 holds."""
    op, inputs, *rest = wide_norm(shape, *types)
    compare(library, op, inputs, *rest, 5e-3)


@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 7, 3, 80), (1, 30, 2, 64)])
def test_rotation_of_patches_equals_its_onnx_function(library, shape):
    inputs, heads = rotation(*shape), {"num_heads": shape[2]}
    for op, dtype, tolerance in (("RotatePatches", HALF, 4e-3), ("RotateQueryKey", FLOAT, 2e-3)):
        compare(library, op, inputs, {"query": (dtype, 3), "key": (dtype, 3)}, heads, tolerance)


@pytest.mark.parametrize(("changed", "size"), [("bias", (95,)), ("cosines", (6, 8)), ("sines", (7, 7))])
def test_rotation_of_patches_rejects_wrong_shapes(library, changed, size):
    inputs = rotation(1, 7, 2, 16) | {changed: random(HALF if changed == "bias" else FLOAT, *size)}
    outputs = {"query": (HALF, 3), "key": (HALF, 3)}
    with pytest.raises(Exception, match=r"tango\.RotatePatches: the shapes of the inputs do not match"):
        open_graph("RotatePatches", inputs, outputs, library, num_heads=2).run(None, inputs)


@pytest.mark.parametrize("shape", [(2, 2, 28, 42), (0, 1, 14, 14), (1, 3, 14, 700)])
def test_patches_equal_their_onnx_function(library, shape):
    compare(library, "Patches", pixels(*shape), {"patches": (HALF, 6)}, {"size": 14}, 0)


@pytest.mark.parametrize(
    ("changed", "size", "words"),
    [
        ("mean", (4,), "the shapes of the inputs do not match"),
        ("deviation", (1, 3), "the shapes of the inputs do not match"),
        ("pixels", (1, 2, 28, 28, 4), "the shapes of the inputs do not match"),
        ("pixels", (1, 2, 28, 27, 3), "columns is 27: it must be a multiple of 14"),
    ],
)
def test_patches_reject_wrong_shapes(library, changed, size, words):
    inputs = pixels(1, 2, 28, 28)
    inputs[changed] = np.zeros(size, inputs[changed].dtype)
    with pytest.raises(Exception, match=rf"tango\.Patches: {words}"):
        open_graph("Patches", inputs, {"patches": (HALF, 6)}, library, size=14).run(None, inputs)


@pytest.mark.parametrize("window", [2, 4, 8])
@pytest.mark.parametrize(("frames", "rows", "columns"), [(2, 4, 6), (1, 7, 9), (3, 1, 1)])
def test_attention_in_windows_equals_its_onnx_function(library, frames, rows, columns, window):
    inputs = windows(frames, rows, columns, 2, 80)
    compare(library, "WindowAttention", inputs, {"y": (HALF, 4)}, {"num_heads": 2, "window": window}, 1e-2)


@pytest.mark.parametrize(("changed", "size"), [("bias", (95,)), ("cosines", (34, 8)), ("sines", (35, 7))])
def test_attention_in_windows_rejects_wrong_shapes(library, changed, size):
    inputs = windows(1, 7, 5, 2, 16) | {changed: random(HALF if changed == "bias" else FLOAT, *size)}
    with pytest.raises(Exception, match=r"tango\.WindowAttention: the shapes of the inputs do not match"):
        open_graph("WindowAttention", inputs, {"y": (HALF, 4)}, library, num_heads=2, window=4).run(None, inputs)


def test_attention_in_windows_rejects_large_windows(library):
    inputs = windows(1, 9, 9, 1, 16)
    with pytest.raises(Exception, match="patches of a window with rotation is 81: it must be from 1 to 64"):
        open_graph("WindowAttention", inputs, {"y": (HALF, 4)}, library, num_heads=1, window=9).run(None, inputs)


def test_attention_in_windows_rejects_rows_without_a_grid(library):
    inputs = rotation(2, 24, 2, 80)
    with pytest.raises(Exception, match=r"tango\.WindowAttention"):
        open_graph("WindowAttention", inputs, {"y": (HALF, 3)}, library, num_heads=2, window=4).run(None, inputs)


@pytest.mark.parametrize("shape", [(2, 24, 2, 80), (1, 70, 1, 64), (3, 1, 2, 16)])
def test_attention_in_frames_equals_its_onnx_function(library, shape):
    compare(library, "FrameAttention", rotated(*shape), {"y": (HALF, 3)}, {"num_heads": shape[2]}, 1e-2)


@pytest.mark.parametrize(
    ("changed", "size"), [("query", (1, 7, 96)), ("key", (1, 6, 32)), ("qkv", (7, 96)), ("bias", (32,))]
)
def test_attention_in_frames_rejects_wrong_shapes(library, changed, size):
    inputs = rotated(1, 7, 2, 16) | {changed: random(HALF, *size)}
    with pytest.raises(Exception, match=r"tango\.FrameAttention: the shapes of the inputs do not match"):
        open_graph("FrameAttention", inputs, {"y": (HALF, 3)}, library, num_heads=2).run(None, inputs)


def test_a_session_takes_the_operators_where_the_library_is(library, tmp_path):
    tower = {"qkv": random(HALF, 1, 4, 192), "bias": random(HALF, 192)}, {"y": (HALF, 3)}, {"num_heads": 1}
    for op in (*ROWS, "VisionAttention"):
        inputs, outputs, attributes = example(op, HALF, (2, 8)) if op in ROWS else tower
        for given in (library, None):
            session = open_graph(op, inputs, outputs, given, tmp_path, **attributes)
            session.run(None, inputs)
            events = json.loads(Path(session.end_profiling()).read_text())
            assert (op in {event["args"].get("op_name") for event in events}) == (given is not None)


def test_every_function_has_an_operator(library):
    """Products and attention over a cache are compared below."""
    tower = {"VisionAttention", "RotatePatches", "RotateQueryKey", "FrameAttention", "WindowAttention"}
    tower |= {"Patches", "WideRMSNorm", "AddWideRMSNorm"}
    decoder = {"CachedAttention", "PositionedAttention", "AttentionShares"}
    quantized = ("Quantize", "WideRMSNorm", "AddWideRMSNorm", *ALSO_QUANTIZED)
    int8, fp8 = ({f"{kind}Linear", *(f"{op}{kind}" for op in quantized)} for kind in ("Int8", "Fp8"))
    assert {*ROWS, *tower, *decoder, *LINEARS, *PRODUCTS, *int8} == set(FUNCTIONS)
    assert {*FUNCTIONS, *fp8, "Fp8LinearGelu"} == set(FP8_FUNCTIONS)


@pytest.mark.parametrize(
    ("op", "changed"),
    [
        ("Bias", {"bias": (4,)}),
        ("BiasGelu", {"bias": (2, 8)}),
        ("BiasFastGelu", {"bias": (1,)}),
        ("SwiGLU", {"up": (8,)}),
        ("LayerNorm", {"beta": (7,)}),
        ("RMSNorm", {"weight": (2, 4)}),
        ("AddLayerNorm", {"bias": (9,)}),
        ("AddLayerNorm", {"branch": (1, 8)}),
        ("AddRMSNorm", {"weight": (1,)}),
        ("BiasSwiGLU", {"up": (1, 8)}),
        ("BiasSwiGLU", {"gate_bias": (4,)}),
        ("BiasSwiGLU", {"up_bias": (2, 8)}),
    ],
)
def test_wrong_shapes_are_rejected_by_name(library, op, changed):
    inputs, outputs, attributes = example(op, FLOAT, (2, 8))
    inputs |= {name: random(FLOAT, *shape) for name, shape in changed.items()}
    with pytest.raises(Exception, match=f"tango.{op}: the shapes of the inputs do not match"):
        open_graph(op, inputs, outputs, library, **attributes).run(None, inputs)


@pytest.mark.parametrize(("columns", "bias", "heads"), [(193, 193, 1), (192, 64, 1), (192, 192, 7), (192, 192, 0)])
def test_attention_of_a_tower_rejects_wrong_shapes(library, columns, bias, heads):
    inputs = {"qkv": random(HALF, 1, 4, columns), "bias": random(HALF, bias)}
    with pytest.raises(Exception, match=r"tango\.VisionAttention: the shapes of the inputs do not match"):
        open_graph("VisionAttention", inputs, {"y": (HALF, 3)}, library, num_heads=heads).run(None, inputs)


def product(form, shape, outputs):
    """An operator of a quantized matrix, its inputs and attributes; x has the shape."""
    bits, group, has_zeros = FORMATS[form]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape[-1], outputs, generator=generator) * shape[-1] ** -0.5
    tensors = [tensor.numpy() for tensor in quantized(weight.half(), form).tensors]
    inputs = {"x": random(HALF, *shape)} | dict(zip(("weight", "scales", "zeros"), tensors, strict=False))
    return PRODUCTS[has_zeros + (group > 0)], inputs, {"bits": bits} if group else {}


@pytest.mark.parametrize("form", [form for form in FORMATS if not form.endswith(INTERLEAVED)])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 144), (0, 32), (3, 4, 64)])
def test_a_product_equals_its_onnx_function(library, form, shape):
    op, inputs, attributes = product(form, shape, 40)
    compare(library, op, inputs, {"y": (HALF, len(shape))}, attributes, 2e-3)


@pytest.mark.parametrize("form", [form for form in FORMATS if form.endswith(INTERLEAVED)])
@pytest.mark.parametrize("outputs", [48, 40])
def test_a_product_of_interleaved_blocks_equals_the_onnx_function_of_others(library, form, outputs):
    op, plain, attributes = product(form.removesuffix(INTERLEAVED), (5, 256), outputs)
    _, inputs, _ = product(form, (5, 256), outputs)
    assert np.array_equal(inputs["weight"], plain["weight"]) == (outputs == 40)
    result = {"y": (HALF, 2)}
    (found,) = open_graph(op, inputs, result, library, interleaved=True, **attributes).run(
        None, inputs | {"x": plain["x"]}
    )
    (wanted,) = open_graph(op, plain, result, **attributes).run(None, plain)
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("op", "shape", "outputs"),
    [
        *[("Linear", *sizes) for sizes in (((5, 64), 40), ((2, 3, 17), 5), ((7,), 3), ((0, 32), 8), ((3, 1), 1))],
        *[("LinearGelu", *sizes) for sizes in (((5, 64), 40), ((2, 3, 24), 8), ((16,), 8), ((0, 32), 8))],
    ],
)
def test_a_product_of_fp16_equals_its_onnx_function(library, op, shape, outputs):
    compare(library, op, *linear(op, shape, outputs), {}, 2e-3)


@pytest.mark.parametrize(
    ("op", "changed"),
    [
        ("Linear", {"weight": (63, 40)}),
        ("Linear", {"weight": (1, 64, 40)}),
        ("LinearGelu", {"weight": (40, 64)}),
        ("LinearGelu", {"bias": (39,)}),
        ("LinearGelu", {"bias": (1, 40)}),
    ],
)
def test_a_product_of_fp16_rejects_wrong_shapes(library, op, changed):
    inputs, outputs = linear(op, (5, 64), 40)
    inputs |= {name: random(HALF, *shape) for name, shape in changed.items()}
    with pytest.raises(Exception, match=f"tango.{op}: the shapes of the inputs do not match"):
        open_graph(op, inputs, outputs, library).run(None, inputs)


@pytest.mark.parametrize(
    ("form", "name", "shape"),
    [
        ("int8", "weight", (63, 40)),
        ("int8", "scales", (39,)),
        ("int4-32", "weight", (40, 3, 16)),
        ("int4-32", "weight", (40, 1, 16)),
        ("int4-32", "scales", (40, 1)),
        ("int4-32-zeros", "zeros", (40, 2)),
    ],
)
def test_a_product_rejects_wrong_shapes(library, form, name, shape):
    op, inputs, attributes = product(form, (5, 64), 40)
    inputs[name] = np.zeros(shape, inputs[name].dtype)
    with pytest.raises(Exception, match=f"tango.{op}: the shapes of the inputs do not match"):
        open_graph(op, inputs, {"y": (HALF, 2)}, library, **attributes).run(None, inputs)


@pytest.mark.parametrize(("bits", "words"), [(5, "bits must be 4 or 8"), (8, "group is 16: it must be 32, 64 or 128")])
def test_a_product_rejects_other_blocks(library, bits, words):
    op, inputs, _ = product("int4-32", (5, 32), 40)
    inputs["x"] = inputs["x"][:, :16].copy()
    with pytest.raises(Exception, match=f"tango.BlockwiseLinear: {words}"):
        open_graph(op, inputs, {"y": (HALF, 2)}, library, bits=bits).run(None, inputs)


def run_quantized(op, inputs, outputs, library=None, **attributes):
    """Runs an operator with quantized inputs or outputs; FP8 comes back in fp32."""
    session = open_graph(op, inputs, outputs, library, **attributes)
    given = {name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(*as_onnx(x)) for name, x in inputs.items()}
    found = session.run_with_ort_values(None, given)
    return [read(value) for value in found]


def as_onnx(array):
    """An array in a type that ONNX Runtime's bindings take, and ONNX's number of its type."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return (array.view(np.uint8) if array.dtype == FP8 else array), kind


def read(value):
    if "float8" not in value.data_type():
        return value.numpy()
    held = (ctypes.c_uint8 * math.prod(value.shape())).from_address(value.data_ptr())
    return np.frombuffer(held, FP8).reshape(value.shape()).astype(np.float32)


#: The other operators of rows that also give quantized results.
ALSO_QUANTIZED = [op for op in ROWS if f"{op}Fp8" in FP8_FUNCTIONS]


def assert_same_steps(found, wanted, kind):
    """Where a result lies between two numbers, arithmetic in another order may choose the other one."""
    tolerance = {"rtol": 0.13, "atol": 2**-8} if kind == "Fp8" else {"atol": 1}
    np.testing.assert_allclose(found.astype(np.float32), wanted, **tolerance)
    assert (found == wanted).sum() >= 0.9 * found.size


@pytest.mark.parametrize("op", ALSO_QUANTIZED)
@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 17), (0, 4)])
def test_a_quantized_result_equals_its_onnx_function(library, op, kind, shape):
    inputs, outputs, attributes = example(op, HALF, shape)
    outputs, attributes = outputs | {"y": (QUANTIZED[kind], len(shape))}, attributes | {"y_scale": 0.01}
    found, wanted = (run_quantized(f"{op}{kind}", inputs, outputs, path, **attributes) for path in (library, None))
    assert [a.shape for a in found] == [a.shape for a in wanted]
    assert_same_steps(found[0], wanted[0], kind)
    for a, b in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("types", [(None, None), (HALF, HALF), (HALF, FLOAT)])
def test_a_quantized_norm_of_an_fp32_stream_equals_its_onnx_function(library, kind, types):
    op, inputs, outputs, attributes = wide_norm((3, 40), *types)
    outputs, attributes = outputs | {"y": (QUANTIZED[kind], 2)}, attributes | {"y_scale": 0.01}
    found, wanted = (run_quantized(f"{op}{kind}", inputs, outputs, path, **attributes) for path in (library, None))
    assert_same_steps(found[0], wanted[0], kind)


def test_quantization_saturates_and_equals_its_onnx_function(library):
    x = {"x": np.array([[0, 1, -3.3, 500, -70, 6e4, 1e-4, np.nan]], HALF)}
    found, wanted = (run_quantized("QuantizeFp8", x, {"y": (FP8, 2)}, path, y_scale=0.1)[0] for path in (library, None))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(found[0], [0, 10, -32, 448, -448, 448, 2**-9, np.nan])


def test_quantization_to_int8_equals_its_onnx_function(library):
    x = {"x": np.arange(1 << 16).astype(np.uint16).view(HALF)}
    x["x"] = x["x"][~np.isnan(x["x"])]
    for scale in (1.0, 0.0123, 300.0):
        found, wanted = (
            open_graph("QuantizeInt8", x, {"y": (np.int8, 1)}, path, y_scale=scale).run(None, x)
            for path in (library, None)
        )
        np.testing.assert_array_equal(found, wanted)


def product_of_int8(shape, outputs):
    integers = {"x": shape, "weight": (shape[-1], outputs)}
    inputs = {name: RNG.integers(-128, 128, size, np.int8) for name, size in integers.items()}
    return inputs | {"scales": RNG.uniform(1e-6, 1e-4, outputs).astype(FLOAT)}


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 144), (0, 32), (2, 1500)])
def test_a_product_of_int8_has_the_bits_of_its_onnx_function(library, shape):
    inputs, y = product_of_int8(shape, 40), {"y": (HALF, len(shape))}
    found, wanted = (
        open_graph("Int8Linear", inputs, y, path, x_scale=0.0123).run(None, inputs)[0] for path in (library, None)
    )
    assert (found.shape, found.tobytes()) == (wanted.shape, wanted.tobytes())


@pytest.mark.parametrize("changed", [{"weight": (63, 40)}, {"scales": (39,)}, {"scales": (1, 40)}])
def test_a_product_of_int8_rejects_wrong_shapes(library, changed):
    inputs = product_of_int8((5, 64), 40)
    inputs |= {name: np.ones(shape, inputs[name].dtype) for name, shape in changed.items()}
    with pytest.raises(Exception, match=r"tango.Int8Linear: the shapes of the inputs do not match"):
        open_graph("Int8Linear", inputs, {"y": (HALF, 2)}, library, x_scale=0.1).run(None, inputs)


def product_of_fp8(shape, outputs):
    weight = random(FLOAT, outputs, shape[-1]).astype(FP8)
    return {"x": random(FLOAT, *shape).astype(FP8), "weight": weight, "scale": np.array(0.01, FLOAT)}


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 144), (0, 32)])
def test_a_product_of_fp8_equals_its_onnx_function(library, shape):
    inputs, y = product_of_fp8(shape, 48), {"y": (HALF, len(shape))}
    found, wanted = (run_quantized("Fp8Linear", inputs, y, path, x_scale=0.1)[0] for path in (library, None))
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 144), (0, 32)])
def test_a_product_of_fp8_with_gelu_equals_its_onnx_function(library, shape):
    inputs, y = product_of_fp8(shape, 48), {"y": (FP8, len(shape))}
    inputs |= {"bias": random(HALF, 48), "y_factor": np.array(50, FLOAT)}
    found, wanted = (run_quantized("Fp8LinearGelu", inputs, y, path, x_scale=10.0)[0] for path in (library, None))
    np.testing.assert_allclose(found, wanted, rtol=0.13, atol=2**-8)
    assert (found == wanted).sum() >= 0.9 * found.size


@pytest.mark.parametrize("changed", [{"bias": (47,)}, {"y_factor": (2,)}])
def test_a_product_of_fp8_with_gelu_rejects_wrong_shapes(library, changed):
    more = {name: np.ones(shape, HALF if name == "bias" else FLOAT) for name, shape in changed.items()}
    inputs = product_of_fp8((5, 64), 48) | {"bias": np.ones(48, HALF), "y_factor": np.array(1, FLOAT)} | more
    with pytest.raises(Exception, match=r"tango.Fp8LinearGelu: the shapes of the inputs do not match"):
        run_quantized("Fp8LinearGelu", inputs, {"y": (FP8, 2)}, library, x_scale=0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": (48, 32)}, "the shapes of the inputs do not match"),
        ({"scale": (48,)}, "the shapes of the inputs do not match"),
        ({"x": (5, 24), "weight": (48, 24)}, "inputs is 24: it must be a multiple of 16"),
    ],
)
def test_a_product_of_fp8_rejects_wrong_shapes(library, changed, message):
    shapes = {"x": (5, 64), "weight": (48, 64), "scale": ()} | changed
    inputs = {name: np.ones(shape, FLOAT if name == "scale" else FP8) for name, shape in shapes.items()}
    with pytest.raises(Exception, match=f"tango.Fp8Linear: {message}"):
        run_quantized("Fp8Linear", inputs, {"y": (HALF, 2)}, library, x_scale=0.1)


def attend(found, library=None, aliased=True):
    """Runs a graph with the operator alone: its output, and the rows of the cache."""
    shape = found.shape
    arrays = {name: tensor.numpy() for name, tensor in found.tensors.items()}
    cache = {name: arrays[name].copy() for name in ("keys", "values")}
    feeds = {
        "qkv": arrays["qkv"],
        "bias": arrays["bias"],
        "past_key": cache["keys"],
        "past_value": cache["values"],
        "last": arrays["last"],
        "cosines": arrays["cosines"],
        "sines": arrays["sines"],
    }
    attn_out = np.full(arrays["attn_out"].shape, np.nan, np.float16)
    present = [rows if aliased else rows.copy() for rows in cache.values()]
    outputs = dict(zip(("attn_out", "present_key", "present_value"), (attn_out, *present), strict=True))
    heads = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
    kinds = {name: (array.dtype, array.ndim) for name, array in outputs.items()}
    op = "PositionedAttention" if found.positioned else "CachedAttention"
    session = open_graph(op, feeds, kinds, library, **heads)
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, feeds), (binding.bind_output, outputs)):
        for name, array in tensors.items():
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    return attn_out, *present


@pytest.mark.parametrize(
    ("shape", "begin"), [(Shape(9, 4, 2, 16, 40), 0), (Shape(5, 6, 2, 32, 64), 20), (Shape(1, 3, 1, 64, 96), 90)]
)
@pytest.mark.parametrize("positioned", [False, True])
def test_attention_equals_its_onnx_function(library, shape, begin, positioned):
    found = Pass(shape, begin, path=library, device="cpu", positioned=positioned)
    (attn_out, *cache), (wanted, *held) = attend(found, library), attend(found)
    np.testing.assert_allclose(attn_out, wanted, rtol=1e-2, atol=1e-2)
    for rows, expected in zip(cache, held, strict=True):
        np.testing.assert_allclose(rows[:, : begin + shape.tokens], expected[:, : begin + shape.tokens], atol=4e-3)


@pytest.mark.parametrize(("shape", "begin"), [(Shape(9, 4, 2, 16, 40), 0), (Shape(1, 6, 2, 32, 64), 20)])
def test_the_shares_of_the_last_token_equal_their_onnx_function(library, shape, begin):
    found = Pass(shape, begin, path=library, device="cpu")
    assert found.enqueue() == 0
    held = {name: tensor.numpy() for name, tensor in found.tensors.items()}
    inputs = {name: held[name] for name in ("qkv", "bias")} | {"present_key": held["keys"]}
    inputs |= {name: held[name] for name in ("last", "cosines", "sines")}
    heads = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
    compare(library, "AttentionShares", inputs, {"shares": (FLOAT, 2)}, heads, 2e-3)
    with pytest.raises(Exception, match=r"tango\.AttentionShares: the shapes of the inputs do not match"):
        compare(library, "AttentionShares", inputs | {"bias": random(HALF, 3)}, {"shares": (FLOAT, 2)}, heads, 2e-3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bias": (3,)}, "the shapes of the inputs do not match"),
        ({"cosines": (64, 4), "sines": (64, 4)}, "the shapes of the inputs do not match"),
        ({"cosines": (20, 8), "sines": (20, 8)}, "the shapes of the inputs do not match"),
    ],
)
def test_attention_rejects_wrong_shapes(library, changed, words):
    found = Pass(Shape(9, 4, 2, 16, 40), path=library, device="cpu")
    for name, size in changed.items():
        found.tensors[name] = torch.zeros(size, dtype=torch.half)
    with pytest.raises(Exception, match=f"tango.CachedAttention: {words}"):
        attend(found, library)


def test_attention_rejects_a_cache_that_it_would_have_to_copy(library):
    found = Pass(Shape(9, 4, 2, 16, 40), path=library, device="cpu")
    with pytest.raises(Exception, match="past and present must be the same memory"):
        attend(found, library, aliased=False)


def test_an_older_onnx_runtime_gets_an_error(library, tmp_path):
    """It has no version 16 of the interface."""
    (tmp_path / "old.cpp").write_text("""
        #include <cstring>
        #include "interface.h"
        extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase*);
        static OrtStatus* keep(OrtErrorCode, const char* message) { return (OrtStatus*)strdup(message); }
        static OrtApi first = [] { OrtApi api = {}; api.CreateStatus = keep; return api; }();
        static const OrtApi* get(uint32_t version) { return version < 16 ? &first : nullptr; }
        static const OrtApiBase old = {get, nullptr};
        extern "C" const char* ask() { return (const char*)RegisterCustomOps(nullptr, &old); }
    """)
    asking = tmp_path / "old.so"
    command = [
        "g++",
        "-std=c++17",
        "-shared",
        "-fPIC",
        f"-I{NATIVE / 'adapters' / 'onnxruntime'}",
        tmp_path / "old.cpp",
        library,
    ]
    subprocess.run([*map(str, command), "-o", str(asking)], check=True)
    ask = ctypes.CDLL(str(asking)).ask
    ask.restype = ctypes.c_char_p
    assert ask() == b"tango's operators need ONNX Runtime 1.16 or later"
