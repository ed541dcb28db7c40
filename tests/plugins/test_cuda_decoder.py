"""Arguments that CudaDecoder rejects before it needs a GPU. test_cuda_emulator.py tests what a step computes."""

from __future__ import annotations

import dataclasses

import pytest

from tango_plugins import TangoError, decoder
from tango_plugins.decoder import CudaDecoder, DecoderShape
from tango_plugins.device_array import DeviceArray
from tango_plugins.matrix import Matrix

SHAPE = DecoderShape(
    layers=2, hidden_size=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocabulary=420, head_columns=448,
    capacity=512, norm_eps=1e-6,
)  # fmt: skip


class RejectingLibrary:
    """A CUDA library that rejects every call."""

    def tango_decode_workspace(self, *arguments):
        return 1

    def tango_last_error(self):
        return b"hidden_size is 72: it must be a multiple of 16"


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.setattr(decoder, "load", lambda path: RejectingLibrary())


def weights(shape=SHAPE):
    """Weights of the right shapes, at an arbitrary address."""
    layers = [
        (f"layers.{i}.{name}", like)
        for i in range(shape.layers)
        for name, like in decoder._layer_weights(shape).items()
    ]
    named = dict(layers) | decoder._other_weights(shape)
    return {name: DeviceArray(4096, *like) for name, like in named.items()}


def matrices(shape=SHAPE):
    """fp16 matrices of the right shapes."""
    sizes = {
        f"layers.{i}.{name}": size for i in range(shape.layers) for name, size in decoder._layer_matrices(shape).items()
    } | {"lm_head.weight": (shape.hidden_size, shape.head_columns)}
    return {name: Matrix(DeviceArray(4096, size, "float16")) for name, size in sizes.items()}


def blocks(inputs, outputs, group=32, zeros=False):
    values = DeviceArray(4096, (outputs, inputs // group, group // 2), "uint8")
    scales = DeviceArray(4096, (outputs, inputs // group), "float16")
    points = DeviceArray(4096, (outputs, -(-inputs // group // 2)), "uint8") if zeros else None
    return Matrix(values, scales, points, 4, group)


def cache(shape=SHAPE):
    return [DeviceArray(4096, (shape.kv_heads, shape.capacity, shape.head_dim), "float16")] * (2 * shape.layers)


def test_the_message_of_the_library_is_reported():
    with pytest.raises(TangoError, match="hidden_size is 72: it must be a multiple of 16"):
        CudaDecoder(SHAPE, weights(), matrices(), cache())


@pytest.mark.parametrize(
    ("name", "memory", "message"),
    [
        ("norm.weight", None, "there is no weight norm.weight"),
        ("norm.weight", DeviceArray(0, (64,), "float16"), r"norm.weight is float16 \[64\]"),
        ("layers.0.self_attn.qkv_proj.bias", DeviceArray(0, (128,), "float32"), "qkv_proj.bias is float32"),
    ],
)
def test_a_missing_or_wrong_weight_is_named(name, memory, message):
    given = weights() | {name: memory}
    if memory is None:
        del given[name]
    with pytest.raises(TangoError, match=message):
        CudaDecoder(SHAPE, given, matrices(), cache())


@pytest.mark.parametrize(
    ("name", "matrix", "message"),
    [
        ("layers.1.mlp.up_proj.weight", None, "there is no weight layers.1.mlp.up_proj.weight"),
        ("lm_head.weight", Matrix(DeviceArray(0, (448, 64), "float16")), r"lm_head.weight is float16 \[448, 64\]"),
        ("lm_head.weight", Matrix(DeviceArray(0, (64, 448), "float32")), "lm_head.weight is float32"),
        (
            "lm_head.weight",
            Matrix(DeviceArray(0, (64, 448), "int8"), bits=8),
            "no weight lm_head.weight's scale",
        ),
        ("lm_head.weight", blocks(96, 448), r"lm_head.weight is uint8 \[448, 3, 16\]"),
        ("lm_head.weight", blocks(64, 448, 16), "lm_head.weight has 4 bits in blocks of 16"),
        ("layers.0.mlp.up_proj.weight", blocks(64, 128), "gate_proj and up_proj have weights of different formats"),
    ],
)
def test_a_missing_or_wrong_matrix_is_named(name, matrix, message):
    given = matrices() | {name: matrix}
    if matrix is None:
        del given[name]
    with pytest.raises(TangoError, match=message):
        CudaDecoder(SHAPE, weights(), given, cache())


@pytest.mark.parametrize("changed", ["int8", "group", "zeros"])
def test_gate_and_up_have_one_format(changed):
    up = {
        "int8": Matrix(DeviceArray(4096, (64, 128), "int8"), DeviceArray(4096, (128,), "float32"), bits=8),
        "group": blocks(64, 128, 64),
        "zeros": blocks(64, 128, zeros=True),
    }[changed]
    given = matrices() | {"layers.0.mlp.gate_proj.weight": blocks(64, 128), "layers.0.mlp.up_proj.weight": up}
    with pytest.raises(TangoError, match="gate_proj and up_proj have weights of different formats"):
        CudaDecoder(SHAPE, weights(), given, cache())


def test_a_cache_of_another_model_is_rejected():
    with pytest.raises(TangoError, match="the cache has 3 tensors"):
        CudaDecoder(SHAPE, weights(), matrices(), cache()[:3])
    with pytest.raises(TangoError, match=r"key 0 is float16 \[2, 256, 16\]"):
        CudaDecoder(SHAPE, weights(), matrices(), cache(dataclasses.replace(SHAPE, capacity=256)))
