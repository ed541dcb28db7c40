"""FP8 on a GPU that has it: quantization, results of other kernels, and cuBLASLt's products, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from tango_plugins import native_library
from tests.plugins.fp8 import (
    E4M3,
    SHAPES,
    TANGO_FP8,
    TENSOR_CORE_SUMS,
    Fp8Product,
    assert_rounded,
    check_every_number,
    check_norm,
    queue,
)
from tests.plugins.norms import HALF, SINGLE, Rows

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="the GPU has no FP8"
)

#: Of a SigLIP tower with four frames, and of the 7B: rows, inputs, outputs.
REAL = [(2916, 1152, 3456), (2916, 1152, 4304), (2916, 4304, 1152), (659, 3584, 4608), (659, 18944, 3584)]


@pytest.mark.parametrize("shape", [*SHAPES, *REAL])
def test_a_product_equals_fp64(shape):
    Fp8Product(*shape).check(TENSOR_CORE_SUMS)


@pytest.mark.parametrize("shape", [*SHAPES, (2916, 1152, 4304)])
def test_a_product_with_gelu_equals_fp64(shape):
    Fp8Product(*shape).check_gelu(TENSOR_CORE_SUMS)


@pytest.mark.parametrize("scale", [1.0, 0.0123, 300.0])
def test_every_fp16_number_is_rounded_as_by_torch(scale):
    check_every_number(native_library.load(), scale)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("width", [1152, 5000, 77])
@pytest.mark.parametrize("types", [(HALF, HALF), (SINGLE, HALF)])
def test_norms_in_fp8(kind, width, types):
    check_norm(*(Rows(kind, 300, width, (*types, SINGLE)) for _ in range(2)))


@pytest.mark.parametrize(("form", "name"), [(0, "none"), (1, "tanh")])
def test_gelu_in_fp8(form, name):
    x, bias = torch.randn(729, 4304, device="cuda").half(), torch.randn(4304, device="cuda").half()
    y = torch.empty(x.shape, dtype=E4M3, device="cuda")
    arguments = x.data_ptr(), bias.data_ptr(), *x.shape, TANGO_FP8, 0.02, y.data_ptr(), queue("cuda")
    assert native_library.load().tango_bias_gelu_enqueue(0, form, *arguments) == 0
    assert_rounded(y, gelu(x.float() + bias.float(), approximate=name), 0.02)


def test_the_same_bits_every_time_and_in_a_graph_whose_shape_is_new():
    product, graph = Fp8Product(661, 1152, 1152), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert product.enqueue() == 0
    graph.replay()
    torch.cuda.synchronize()
    wanted = product.y.clone()
    for _ in range(1000):
        product.enqueue()
    assert torch.equal(product.y[:-1], wanted[:-1])
