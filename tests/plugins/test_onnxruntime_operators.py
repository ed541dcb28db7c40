"""The custom operators in ONNX Runtime, with their kernels in the CUDA emulator."""

from __future__ import annotations

import ctypes
import json
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper

from tango_export.graph.device import OP_FUNCTIONS
from tango_plugins.native_library import NATIVE
from tests.plugins.attentions import Pass, Shape
from tests.plugins.cuda_emulator import compiled

pytestmark = pytest.mark.nvcc

OPERATORS = ("Bias", "BiasFastGelu", "SwiGLU")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("operators"), "attention", "activation", "operators")


def open_graph(op, inputs, outputs, library=None, profile=None, **attributes):
    """A session of a graph with the operator alone; without the library it runs the operator's ONNX function."""

    def value_infos(tensors):
        kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in tensors.items()}
        return [helper.make_tensor_value_info(name, kinds[name], [None] * tensors[name].ndim) for name in tensors]

    node = helper.make_node(op, list(inputs), list(outputs), "node", domain="tango", **attributes)
    graph = helper.make_graph([node], "graph", value_infos(inputs), value_infos(outputs))
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 17), ("tango", 1))]
    model = helper.make_model(graph, opset_imports=opsets, functions=[OP_FUNCTIONS[op]], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile / "profile")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(op, a, b, library=None):
    (found,) = open_graph(op, {"a": a, "b": b}, {"y": a}, library).run(None, {"a": a, "b": b})
    return found


def tensors(op, shape, dtype=np.float32):
    rng = np.random.default_rng(len(shape))
    return [rng.normal(size=s).astype(dtype) for s in (shape, shape if op == "SwiGLU" else shape[-1:])]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-6), (np.float16, 4e-3)])
@pytest.mark.parametrize("shape", [(5,), (3, 8), (2, 3, 17), (0, 4), (2, 0)])
def test_it_equals_its_onnx_function(library, op, shape, dtype, tolerance):
    a, b = tensors(op, shape, dtype)
    found, wanted = run(op, a, b, library), run(op, a, b)
    assert (found.shape, found.dtype) == (shape, dtype)
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_session_takes_it_where_the_library_is(library, op, tmp_path):
    a, b = tensors(op, (2, 8))
    for given in (library, None):
        session = open_graph(op, {"a": a, "b": b}, {"y": a}, given, tmp_path)
        session.run(None, {"a": a, "b": b})
        events = json.loads(Path(session.end_profiling()).read_text())
        assert (op in {event["args"].get("op_name") for event in events}) == (given is not None)


@pytest.mark.parametrize(
    ("op", "shapes", "words"),
    [
        ("Bias", ((2, 8), (4,)), "tango.Bias: the shapes of the inputs do not match"),
        ("BiasFastGelu", ((2, 8), (2, 8)), "tango.BiasFastGelu: the shapes of the inputs do not match"),
        ("SwiGLU", ((2, 8), (8,)), "tango.SwiGLU: the shapes of the inputs do not match"),
    ],
)
def test_wrong_shapes_are_rejected_by_name(library, op, shapes, words):
    with pytest.raises(Exception, match=words):
        run(op, *(np.ones(shape, np.float32) for shape in shapes), library)


def attend(found, library=None, aliased=True):
    """Runs a graph with the operator alone: its output, and the rows of the cache."""
    shape = found.shape
    arrays = {name: tensor.numpy() for name, tensor in found.tensors.items()}
    cache = {name: arrays[name][None].copy() for name in ("keys", "values")}
    for rows in cache.values():
        np.nan_to_num(rows, copy=False)  # ONNX Runtime's own operator reads all rows
    feeds = {
        "qkv": arrays["qkv"][None],
        "bias": arrays["bias"],
        "past_key": cache["keys"],
        "past_value": cache["values"],
        "last": arrays["last"],
        "total": np.array([shape.tokens if not found.begin else shape.capacity], np.int32),
        "cosines": arrays["cosines"],
        "sines": arrays["sines"],
    }
    attn_out = np.full((1, *arrays["attn_out"].shape), np.nan, np.float16)
    present = [rows if aliased else rows.copy() for rows in cache.values()]
    outputs = dict(zip(("attn_out", "present_key", "present_value"), (attn_out, *present), strict=True))
    heads = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
    session = open_graph("CachedAttention", feeds, outputs, library, **heads)
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, feeds), (binding.bind_output, outputs)):
        for name, array in tensors.items():
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    return attn_out[0], *(rows[0] for rows in present)


@pytest.mark.parametrize(
    ("shape", "begin"), [(Shape(9, 4, 2, 16, 40), 0), (Shape(5, 6, 2, 32, 64), 20), (Shape(1, 3, 1, 64, 96), 90)]
)
def test_attention_equals_its_onnx_function(library, shape, begin):
    found = Pass(shape, begin, path=library, device="cpu")
    (attn_out, *cache), (wanted, *held) = attend(found, library), attend(found)
    np.testing.assert_allclose(attn_out, wanted, rtol=1e-2, atol=1e-2)
    for rows, expected in zip(cache, held, strict=True):
        np.testing.assert_allclose(rows[:, : begin + shape.tokens], expected[:, : begin + shape.tokens], atol=4e-3)


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
