"""INT8 on a GPU: quantization, results of other kernels, and products whose sums are exact."""

from __future__ import annotations

import pytest
import torch

from tango_plugins import native_library
from tests.plugins.fp8 import queue
from tests.plugins.int8 import SHAPES, TANGO_INT8, Int8Product, assert_rounded, check_every_number, check_norm
from tests.plugins.norms import HALF, SINGLE, Rows

#: Of a SigLIP tower with four frames, of the 0.5B and of the 7B: rows, inputs, outputs.
REAL = [
    (2916, 1152, 3456),
    (2916, 4304, 1152),
    (659, 896, 1152),
    (659, 4864, 896),
    (659, 3584, 4608),
    (659, 18944, 3584),
    (1, 896, 152064),
]


@pytest.mark.parametrize("shape", [*SHAPES, (250, 80, 130), (3000, 48, 272), *REAL])
def test_a_product_is_exact(shape):
    Int8Product(*shape).check()


def test_the_largest_sums_of_a_down_projection_are_exact():
    """They are 310,378,496, or a little less, which fp32 does not hold."""
    product = Int8Product(70, 18944, 136)
    product.x.fill_(-128)
    product.weight.fill_(-128)
    product.weight[-1] = torch.arange(136, device="cuda").clamp(max=127)
    product.check()


@pytest.mark.parametrize("scale", [1.0, 0.0123, 300.0])
def test_every_fp16_number_is_rounded_as_by_torch(scale):
    check_every_number(native_library.load(), scale)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("width", [1152, 5000, 77])
@pytest.mark.parametrize("types", [(HALF, HALF), (SINGLE, HALF)])
def test_norms_in_int8_are_those_in_fp32_rounded(kind, width, types):
    check_norm(*(Rows(kind, 300, width, (*types, SINGLE)) for _ in range(2)))


@pytest.mark.parametrize("form", [0, 1])
def test_gelu_in_int8_is_that_in_fp32_rounded(form):
    x, bias = torch.randn(729, 4304, device="cuda"), torch.randn(4304, device="cuda")
    y, wide = torch.empty(x.shape, dtype=torch.int8, device="cuda"), torch.empty(x.shape, device="cuda")
    given = 1, form, x.data_ptr(), bias.data_ptr(), *x.shape
    library = native_library.load()
    assert library.tango_bias_gelu_enqueue(*given, 1, 0.0, wide.data_ptr(), queue("cuda")) == 0
    assert library.tango_bias_gelu_enqueue(*given, TANGO_INT8, 0.05, y.data_ptr(), queue("cuda")) == 0
    assert_rounded(y, wide, 0.05)


def test_the_same_bits_every_time_and_in_a_graph():
    product, graph = Int8Product(661, 1152, 1152), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert product.enqueue() == 0
    graph.replay()
    torch.cuda.synchronize()
    wanted = product.y.clone()
    assert torch.equal(wanted[:-1], product.wanted())
    for _ in range(1000):
        product.enqueue()
    assert torch.equal(product.y[:-1], wanted[:-1])
