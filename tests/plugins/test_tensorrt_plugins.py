"""The TensorRT plugins, with their kernels in the CUDA emulator, in a host that does with them what TensorRT does.

Needs NvInfer.h: ``--tensorrt-include FOLDER``. Which of the two interfaces is tested is for its version to say. A
compiler's warning is an error.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tango_export.graph.operators import FP8_FUNCTIONS
from tango_plugins.native_library import NATIVE
from tests.plugins.attentions import Pass, Shape
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


class HostTensor(ctypes.Structure):
    """As in tensorrt_host.cpp."""

    _fields_ = (
        ("type", ctypes.c_char_p),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 8),
        ("data", ctypes.c_void_p),
    )


class Number(ctypes.Union):
    """The value of a field."""

    _fields_ = (("integer", ctypes.c_int32), ("real", ctypes.c_float))


class HostField(ctypes.Structure):
    """As in tensorrt_host.cpp."""

    _fields_ = (("name", ctypes.c_char_p), ("is_float", ctypes.c_int32), ("value", Number))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tensorrt_headers, tensorrt_version, emulated_plugins):
    """``run(op, inputs, outputs, **attributes)`` fills the outputs; returns None, or what is wrong.

    ``building``: as a builder runs a plugin to time it, before any engine stores it.
    """
    if tensorrt_version < (8, 6):
        pytest.skip("TensorRT 8.5 does not ask a library for its plugins; with its headers they were compiled")
    path = tmp_path_factory.mktemp("host") / "host.so"
    command = ["nvcc", "-x", "c++", "-std=c++17", "-shared", "-cudart", "none", "-isystem", str(tensorrt_headers)]
    command += ["-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror,-Wno-deprecated-declarations"]
    source = str(Path(__file__).with_name("tensorrt_host.cpp"))
    subprocess.run([*command, source, "-ldl", "-o", str(path)], check=True)
    host = ctypes.CDLL(str(path))
    host.host_run.restype = host.host_names.restype = ctypes.c_char_p

    def tensors(arrays):
        return (HostTensor * len(arrays))(
            *(
                HostTensor(a.dtype.name.encode(), a.ndim, (ctypes.c_int64 * 8)(*a.shape), a.ctypes.data)
                for a in arrays.values()
            )
        )

    def called(op, inputs, outputs, building=False, **attributes):
        fields = (HostField * len(attributes))(
            *(
                HostField(name.encode(), isinstance(value, float), Number(**{_member(value): value}))
                for name, value in attributes.items()
            )
        )
        given = (fields, len(fields), tensors(inputs), len(inputs), tensors(outputs), len(outputs))
        wrong = host.host_run(str(emulated_plugins).encode(), op.encode(), *given, int(building))
        return wrong.decode() if wrong else None

    called.names = lambda: host.host_names(str(emulated_plugins).encode()).decode().split()
    return called


def _member(value):
    return "real" if isinstance(value, float) else "integer"


def compare(run, library, op, inputs, outputs, attributes):
    """A plugin and a custom operator, which are made of one table, give the same bits."""
    wanted = open_graph(op, inputs, outputs, library, **attributes).run(None, inputs)
    found = {
        name: np.full_like(array, np.nan if array.dtype.kind == "f" else 77)
        for name, array in zip(outputs, wanted, strict=True)
    }
    assert run(op, inputs, found, **attributes) is None
    for array, expected in zip(found.values(), wanted, strict=True):
        assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("op", ROWS)
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 17), (0, 4)])
def test_it_is_the_custom_operator(run, emulated_plugins, op, shape, dtype):
    compare(run, emulated_plugins, op, *example(op, dtype, shape))


@pytest.mark.parametrize("op", ["AddLayerNorm", "AddRMSNorm"])
def test_the_residual_stream_may_be_wider(run, emulated_plugins, op):
    compare(run, emulated_plugins, op, *example(op, HALF, (3, 24), FLOAT))


def test_attention_of_a_tower(run, emulated_plugins):
    inputs = {"qkv": random(HALF, 2, 9, 3 * 128), "bias": random(HALF, 3 * 128)}
    compare(run, emulated_plugins, "VisionAttention", inputs, {"y": (HALF, 3)}, {"num_heads": 2})


@pytest.mark.parametrize("types", [(None, None), (HALF, HALF), (HALF, FLOAT)])
def test_norms_of_an_fp32_stream(run, emulated_plugins, types):
    compare(run, emulated_plugins, *wide_norm((3, 24), *types))


def test_what_attention_of_patches_is_made_of(run, emulated_plugins):
    given, heads = rotation(2, 7, 3, 80), {"num_heads": 3}
    for op, dtype in (("RotatePatches", HALF), ("RotateQueryKey", FLOAT)):
        compare(run, emulated_plugins, op, given, {"query": (dtype, 3), "key": (dtype, 3)}, heads)
    compare(run, emulated_plugins, "FrameAttention", rotated(2, 7, 3, 80), {"y": (HALF, 3)}, heads)
    given = windows(2, 3, 5, 3, 80)
    compare(run, emulated_plugins, "WindowAttention", given, {"y": (HALF, 4)}, heads | {"window": 2})
    compare(run, emulated_plugins, "Patches", pixels(2, 2, 28, 42), {"patches": (HALF, 6)}, {"size": 14})


@pytest.mark.parametrize("op", ["Linear", "LinearGelu"])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 24), (0, 32)])
def test_products(run, emulated_plugins, op, shape):
    compare(run, emulated_plugins, op, *linear(op, shape, 40), {})


def test_int8_between_plugins(run, emulated_plugins):
    inputs, outputs, attributes = example("RMSNorm", HALF, (2, 3, 16))
    outputs = {name: (np.int8, rank) for name, (_, rank) in outputs.items()}
    compare(run, emulated_plugins, "RMSNormInt8", inputs, outputs, attributes | {"y_scale": 0.01})
    integers = {"x": (2, 3, 16), "weight": (16, 24)}
    inputs = {name: RNG.integers(-128, 128, shape, np.int8) for name, shape in integers.items()}
    inputs |= {"scales": RNG.uniform(1e-4, 1e-3, 24).astype(FLOAT)}
    compare(run, emulated_plugins, "Int8Linear", inputs, {"y": (HALF, 3)}, {"x_scale": 0.01})


def test_every_operator_is_a_plugin(run):
    assert {*FP8_FUNCTIONS, "TangoPrune"} == set(run.names())


def attend(run, found, copied=(), **how):
    """Attention over a cache in the plugin: what is wrong, the output, and the cache."""
    arrays = {name: tensor.numpy() for name, tensor in found.tensors.items()}
    cache = {name: arrays[name].copy() for name in ("keys", "values")}
    inputs = {"qkv": arrays["qkv"], "bias": arrays["bias"], **cache}
    inputs |= {name: arrays[name] for name in ("last", "cosines", "sines")}
    present = {name: rows.copy() if name in copied else rows for name, rows in cache.items()}
    outputs = {"attn_out": np.full_like(arrays["attn_out"], np.nan), **present}
    heads = {"num_heads": found.shape.heads, "kv_num_heads": found.shape.kv_heads}
    return run("CachedAttention", inputs, outputs, **heads, **how), outputs["attn_out"], *present.values()


def test_attention_over_a_cache(run, emulated_plugins):
    found = Pass(Shape(5, 6, 2, 32, 64), 20, path=emulated_plugins, device="cpu")
    wrong, *given = attend(run, found)
    assert wrong is None
    assert found.enqueue() == 0
    for array, name in zip(given, ("attn_out", "keys", "values"), strict=True):
        assert array.tobytes() == found.tensors[name].numpy().tobytes()


def test_a_cache_that_would_have_to_be_copied_is_rejected(run, emulated_plugins):
    found = Pass(Shape(9, 4, 2, 16, 40), path=emulated_plugins, device="cpu")
    wrong, *_ = attend(run, found, copied={"values"})
    assert wrong == "CachedAttention: past and present must be the same memory"


def test_a_builder_that_has_no_cache_times_nothing(run, emulated_plugins):
    found = Pass(Shape(9, 4, 2, 16, 40), path=emulated_plugins, device="cpu")
    before = [found.tensors[name].numpy().tobytes() for name in ("attn_out", "keys", "values")]
    wrong, *after = attend(run, found, copied={"keys", "values"}, building=True)
    assert wrong is None
    assert [array.tobytes() for array in after] == before


@pytest.mark.parametrize(("last", "nearest"), [(-(2**31), 8), (-5, 8), (40, 39), (2**31 - 1, 39)])
def test_a_builder_may_time_on_memory_that_nobody_filled(run, emulated_plugins, last, nearest):
    """The last position is then any number; rows are written inside the cache."""
    results = []
    for position in (last, nearest):
        found = Pass(Shape(9, 4, 2, 16, 40), path=emulated_plugins, device="cpu")
        found.tensors |= {name: tensor.nan_to_num() for name, tensor in found.tensors.items()}
        found.tensors["last"][0] = position
        results.append(attend(run, found, building=True))
    for given, wanted in zip(*results, strict=True):
        assert given is wanted is None or given.tobytes() == wanted.tobytes()


def rows(dtype=HALF):
    return {"x": random(dtype, 2, 8), "weight": random(FLOAT, 8)}, {"y": np.zeros((2, 8), dtype)}


def test_types_that_no_kernel_has_are_rejected(run):
    inputs, outputs = rows()
    inputs["weight"] = inputs["weight"].astype(HALF)
    assert run("RMSNorm", inputs, outputs, epsilon=1e-5) == "tensor 1 cannot have this type"


def test_wrong_shapes_are_rejected_by_name(run):
    inputs, outputs = rows()
    inputs["weight"] = random(FLOAT, 7)
    assert run("RMSNorm", inputs, outputs, epsilon=1e-5) == "RMSNorm: the shapes of the inputs do not match"


def test_a_missing_input_is_named(run):
    inputs, outputs = rows()
    del inputs["weight"]
    assert run("RMSNorm", inputs, outputs, epsilon=1e-5) == "RMSNorm: it takes 2 inputs"


def test_too_few_axes_are_named(run):
    inputs = {"qkv": random(HALF, 9, 384), "bias": random(HALF, 384)}
    wrong = run("VisionAttention", inputs, {"y": np.zeros((9, 128), HALF)}, num_heads=2)
    assert wrong == "VisionAttention: input 0 has too few axes"


@pytest.mark.parametrize("attributes", [{}, {"epsilon": 1}])
def test_a_wrong_field_is_named(run, attributes):
    assert run("RMSNorm", *rows(), **attributes) == "RMSNorm: attribute epsilon must be one number"


def test_the_sources_are_those_that_cmake_compiles():
    listed = re.search(r"add_library\(tango_tensorrt SHARED (.*?)\)\n", (NATIVE / "CMakeLists.txt").read_text(), re.S)
    found = {path.name for path in (NATIVE / "adapters" / "tensorrt").glob("*.cpp")}
    assert set(re.findall(r"adapters/tensorrt/(\S+)", listed.group(1))) == found
