"""Our operators in ONNX Runtime: the adapter as it is, in a session on a CPU, with arithmetic of a CPU's behind it."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from tango_export.fused import meaning
from tango_plugins.library import NATIVE

HERE = Path(__file__).parent / "on_a_cpu"
OPERATORS = ("Bias", "BiasGelu", "SwiGLU")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH")
    path = tmp_path_factory.mktemp("operators") / "operators.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    provider = '-DTANGO_ONNXRUNTIME_PROVIDER="CPUExecutionProvider"'
    sources = [NATIVE / "adapters" / "onnxruntime.cpp", HERE / "activate.cpp"]
    command = ["g++", *flags, provider, f"-I{NATIVE / 'include'}", *sources, "-o", path]
    subprocess.run(list(map(str, command)), check=True)
    return path


def run(op, a, b, library=None, profile=None):
    """A graph of the operator alone, on ONNX Runtime's CPU provider; without the library, by what the graph says."""
    kind = helper.np_dtype_to_tensor_dtype(a.dtype)
    tensors = [helper.make_tensor_value_info(n, kind, [None] * x.ndim) for n, x in (("a", a), ("b", b), ("y", a))]
    node = helper.make_node(op, ["a", "b"], ["y"], "node", domain="tango")
    graph = helper.make_graph([node], "graph", tensors[:2], tensors[2:])
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 17), ("tango", 1))]
    model = helper.make_model(graph, opset_imports=opsets, functions=[meaning(op)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile / "profile")
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": a, "b": b})
    if profile is not None:
        return {event["args"].get("op_name") for event in json.loads(Path(session.end_profiling()).read_text())}
    return found


def tensors(op, shape, dtype=np.float32):
    rng = np.random.default_rng(len(shape))
    return [rng.normal(size=s).astype(dtype) for s in (shape, shape if op == "SwiGLU" else shape[-1:])]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-6), (np.float16, 4e-3)])
@pytest.mark.parametrize("shape", [(5,), (3, 8), (2, 3, 17), (0, 4), (2, 0)])
def test_it_is_what_the_graph_says_of_it(library, op, shape, dtype, tolerance):
    a, b = tensors(op, shape, dtype)
    found, wanted = run(op, a, b, library), run(op, a, b)
    assert (found.shape, found.dtype) == (shape, dtype)
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_session_takes_it_where_the_library_is(library, op, tmp_path):
    a, b = tensors(op, (2, 8))
    assert op in run(op, a, b, library, tmp_path)
    assert op not in run(op, a, b, None, tmp_path)


@pytest.mark.parametrize(
    ("op", "shapes", "words"),
    [
        ("Bias", ((2, 8), (4,)), "tango.Bias: the shapes of the inputs do not fit"),
        ("BiasGelu", ((2, 8), (2, 8)), "tango.BiasGelu: the shapes of the inputs do not fit"),
        ("SwiGLU", ((2, 8), (8,)), "tango.SwiGLU: the shapes of the inputs do not fit"),
        ("BiasGelu", ((2, 13), (13,)), "tango.BiasGelu: thirteen is refused"),
    ],
)
def test_what_it_cannot_take_is_refused_by_name(library, op, shapes, words):
    with pytest.raises(Exception, match=words):
        run(op, *(np.ones(shape, np.float32) for shape in shapes), library)


def test_an_older_onnx_runtime_is_told_which_it_takes(library, tmp_path):
    """It has no 16th version of the interface."""
    (tmp_path / "old.cpp").write_text("""
        #include <cstring>
        #include "onnxruntime_interface.h"
        extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase*);
        static OrtStatus* keep(OrtErrorCode, const char* message) { return (OrtStatus*)strdup(message); }
        static OrtApi first = [] { OrtApi api = {}; api.CreateStatus = keep; return api; }();
        static const OrtApi* get(uint32_t version) { return version < 16 ? &first : nullptr; }
        static const OrtApiBase old = {get, nullptr};
        extern "C" const char* ask() { return (const char*)RegisterCustomOps(nullptr, &old); }
    """)
    asking = tmp_path / "old.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{NATIVE / 'adapters'}", tmp_path / "old.cpp", library]
    subprocess.run([*map(str, command), "-o", str(asking)], check=True)
    ask = ctypes.CDLL(str(asking)).ask
    ask.restype = ctypes.c_char_p
    assert ask() == b"tango's operators need ONNX Runtime 1.16 or later"
