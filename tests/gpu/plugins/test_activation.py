"""Biases and activations on the GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, silu

from tango_plugins import native_library

DTYPES = {torch.float16: 0, torch.float32: 1}
#: Relative and absolute. The absolute ones are for subnormal fp16, and for GELU values that tanh cancels in fp64.
TOLERANCES = {torch.float16: (2**-11 * 1.02, 1e-7), torch.float32: (1e-5, 1e-12)}

#: Many blocks, few, one row, and widths that are no multiple of 16 bytes.
SHAPES = [(729, 4304), (33, 64), (1, 8), (1, 18944), (7, 13), (300, 1001)]


#: GELU by its form: the argument that names it, and what PyTorch calls it.
FORMS = {"tango_bias_gelu_enqueue erf": (0, "none"), "tango_bias_gelu_enqueue tanh": (1, "tanh")}


def call(name, a, b, y, dtype=None):
    function = getattr(native_library.load(), name.split()[0])
    lengths = [a.numel()] if name == "tango_swiglu_enqueue" else [a.shape[0], a.shape[1]]
    kinds = [DTYPES[a.dtype] if dtype is None else dtype, *FORMS.get(name, ())[:1]]
    result = () if name == "tango_bias_enqueue" else (kinds[0], 0.0)
    stream = torch.cuda.current_stream().cuda_stream
    return function(*kinds, a.data_ptr(), b if b is None else b.data_ptr(), *lengths, *result, y.data_ptr(), stream)


def wanted(name, a, b):
    a, b = a.double(), b.double()
    if name == "tango_swiglu_enqueue":
        return silu(a) * b
    return gelu(a + b, approximate=FORMS[name][1]) if name in FORMS else a + b


def tensors(name, shape, dtype, offset=0, scale=3.0):
    """Inputs, and a poisoned output with memory around it, each ``offset`` elements after a multiple of 256 bytes."""
    generator = torch.Generator("cuda").manual_seed(shape[1])
    sizes = [shape[0] * shape[1], shape[0] * shape[1] if name == "tango_swiglu_enqueue" else shape[1]]
    made = [torch.randn(offset + n, generator=generator, device="cuda") * scale for n in sizes]
    a, b = (tensor.to(dtype)[offset:] for tensor in made)
    poisoned = torch.full((offset + sizes[0] + 64,), -77.0, dtype=dtype, device="cuda")
    return a.view(shape), b.view(shape) if len(b) == len(a) else b, poisoned


NAMES = ("tango_bias_enqueue", *FORMS, "tango_swiglu_enqueue")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_the_result_is_fp64_rounded_once(name, dtype, shape, offset):
    a, b, poisoned = tensors(name, shape, dtype, offset)
    y = poisoned[offset : offset + a.numel()].view(shape)
    assert call(name, a, b, y) == 0
    expected = wanted(name, a, b)
    relative, absolute = TOLERANCES[dtype]
    assert ((y.double() - expected).abs() <= relative * expected.abs() + absolute).all()
    around = torch.cat((poisoned[:offset], poisoned[offset + a.numel() :]))
    assert (around == -77.0).all()
    assert call(name, a, b, a) == 0  # in place
    assert torch.equal(a, y)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_without_a_bias(name, shape):
    a, b, poisoned = tensors(name, shape, torch.float16)
    with_zeros, y = torch.empty_like(a), poisoned[: a.numel()].view(shape)
    assert call(name, a, torch.zeros_like(b), with_zeros) == 0
    assert call(name, a, None, y) == 0
    assert torch.equal(y, with_zeros)


@pytest.mark.parametrize("name", NAMES)
def test_large_values_and_nan_pass(name):
    a = torch.tensor([[6e4, -6e4, 300.0, -300.0, 0.0, torch.nan, 1e-7, -1e-7]], dtype=torch.float16, device="cuda")
    b = torch.ones_like(a) if name == "tango_swiglu_enqueue" else torch.zeros_like(a[0])
    y = torch.empty_like(a)
    assert call(name, a, b, y) == 0
    torch.testing.assert_close(y.double(), wanted(name, a, b), rtol=1e-3, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_replays_it(name):
    a, b, poisoned = tensors(name, (64, 256), torch.float16)
    y, graph = poisoned[: a.numel()].view(a.shape), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert call(name, a, b, y) == 0
    a.copy_(torch.flip(a, [0]))
    graph.replay()
    torch.testing.assert_close(y.double(), wanted(name, a, b), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_empty_tensors_are_accepted(name):
    a, b, y = tensors(name, (1, 8), torch.float16)
    assert call(name, a[:0], b, y[:0]) == 0
    assert (y == -77.0).all()


def test_an_unknown_gelu_is_rejected_by_name():
    a, b, y = tensors("tango_bias_enqueue", (2, 8), torch.float16)
    function = native_library.load().tango_bias_gelu_enqueue
    assert function(0, 2, a.data_ptr(), b.data_ptr(), 2, 8, 0, 0.0, y.data_ptr(), None) != 0
    assert native_library.load().tango_last_error().decode().startswith("gelu is 2")


@pytest.mark.parametrize("dtype", [-1, 2])
def test_an_unknown_dtype_is_rejected_by_name(dtype):
    a, b, y = tensors("tango_bias_enqueue", (2, 8), torch.float16)
    assert call("tango_bias_enqueue", a, b, y, dtype) != 0
    assert native_library.load().tango_last_error().decode().startswith(f"dtype is {dtype}")


def test_a_null_tensor_is_rejected_by_name():
    a, b, y = tensors("tango_swiglu_enqueue", (2, 8), torch.float16)
    assert call("tango_swiglu_enqueue", a, b[:0], y) != 0
    assert native_library.load().tango_last_error().decode() == "up is null"
