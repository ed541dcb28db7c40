"""INT8 in the CUDA emulator: quantization, results of other kernels, and products whose sums are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tango_plugins import native_library, structs
from tests.plugins.cuda_emulator import compiled
from tests.plugins.int8 import SHAPES, TANGO_INT8, Int8Product, check_every_number, check_norm, rounded
from tests.plugins.norms import HALF, SINGLE, Rows

pytestmark = pytest.mark.nvcc

BAD_ARGUMENT = 1
HERE = 4096  # an aligned address, which is not read


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("int8"), "linear", "products", "activation", "norm")


@pytest.fixture(scope="module")
def library(path):
    return native_library.load(path)


@pytest.mark.parametrize("scale", [1.0, 0.0123, 300.0])
def test_every_fp16_number_is_rounded_as_by_torch(library, scale):
    check_every_number(library, scale, "cpu")


def test_halves_go_to_the_even_number_and_ends_saturate(library):
    halves, ends = [0.25, 0.75, 1.25, -0.25, -0.75, 63.25], [63.75, -64.25, 1e30, -1e30, np.inf, -np.inf, np.nan]
    x = torch.tensor(halves + ends)
    y = torch.empty(x.shape, dtype=torch.int8)
    assert library.tango_quantize_enqueue(1, x.data_ptr(), x.numel(), TANGO_INT8, 0.5, y.data_ptr(), None) == 0
    assert y.tolist() == [0, 2, 2, 0, -2, 126, 127, -128, 127, -128, 127, -128, 0]


def test_it_is_a_division(library):
    """10.85 / 0.7 is 15.499999 in fp32, and 10.85 · (1 / 0.7) is 15.5."""
    x, scale = np.float32(15.5) * np.float32(0.7), np.float32(0.7)
    assert (np.rint(x / scale), np.rint(x * (1 / scale))) == (15, 16)
    given, y = torch.tensor([x]), torch.empty(1, dtype=torch.int8)
    assert library.tango_quantize_enqueue(1, given.data_ptr(), 1, TANGO_INT8, scale, y.data_ptr(), None) == 0
    assert y.item() == 15


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_fp32_is_quantized_up_to_its_end(library, size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 5
    y = torch.full((size + 1,), 77, dtype=torch.int8)
    assert library.tango_quantize_enqueue(1, x.data_ptr(), size, TANGO_INT8, 0.1, y.data_ptr(), None) == 0
    assert torch.equal(y[:-1], rounded(x, 0.1))
    assert y[-1] == 77


@pytest.mark.parametrize("gelu", [0, 1])
@pytest.mark.parametrize("shape", [(3, 64), (2, 13)])
def test_gelu_in_int8_is_that_in_fp32_rounded(library, gelu, shape):
    x, bias = torch.randn(shape) * 4, torch.randn(shape[1])
    y, wide = torch.empty(shape, dtype=torch.int8), torch.empty(shape)
    given = 1, gelu, x.data_ptr(), bias.data_ptr(), *shape
    assert library.tango_bias_gelu_enqueue(*given, 1, 0.0, wide.data_ptr(), None) == 0
    assert library.tango_bias_gelu_enqueue(*given, TANGO_INT8, 0.05, y.data_ptr(), None) == 0
    assert torch.equal(y, rounded(wide, 0.05))


@pytest.mark.parametrize("width", [48, 13])
def test_gated_activations_in_int8_are_those_in_fp32_rounded(library, width):
    gate, up = (torch.randn(5, width, generator=torch.Generator().manual_seed(seed)) * 3 for seed in (0, 1))
    y, biased, zeros = *(torch.empty(5, width, dtype=torch.int8) for _ in range(2)), torch.zeros(width)
    result = TANGO_INT8, 0.01
    pointers = gate.data_ptr(), up.data_ptr()
    assert library.tango_swiglu_enqueue(1, *pointers, gate.numel(), *result, y.data_ptr(), None) == 0
    gates = gate.data_ptr(), zeros.data_ptr(), up.data_ptr(), zeros.data_ptr()
    assert library.tango_bias_swiglu_enqueue(1, *gates, 5, width, 0.5, *result, biased.data_ptr(), None) == 0
    wide = torch.empty(5, width)
    assert library.tango_swiglu_enqueue(1, *pointers, gate.numel(), 1, 0.0, wide.data_ptr(), None) == 0
    assert torch.equal(y, rounded(wide, 0.01))
    assert torch.equal(biased, rounded(wide / 2, 0.01))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("width", [192, 1280, 77])
@pytest.mark.parametrize("types", [(HALF, HALF), (SINGLE, HALF)])
def test_norms_in_int8(path, kind, width, types):
    check_norm(*(Rows(kind, 3, width, (*types, SINGLE), path=path, device="cpu") for _ in range(2)))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_are_finite_and_above_zero(library, path, scale):
    rows = Rows("rms", 1, 8, path=path, device="cpu")
    assert rows.enqueue(y_dtype=TANGO_INT8, y_scale=scale) == BAD_ARGUMENT
    assert library.tango_last_error().startswith(b"y_scale is ")
    assert library.tango_quantize_enqueue(0, HERE, 8, TANGO_INT8, scale, HERE, None) == BAD_ARGUMENT
    assert library.tango_last_error().startswith(b"y_scale is ")
    assert Int8Product(1, 16, 16, path=path, device="cpu").enqueue(x_scale=scale) == BAD_ARGUMENT
    assert library.tango_last_error().startswith(b"x_scale is ")


def test_results_have_one_of_the_types(library):
    assert library.tango_quantize_enqueue(0, HERE, 8, 1, 1.0, HERE, None) == BAD_ARGUMENT
    assert library.tango_last_error() == b"y_dtype is 1: it must be from 2 to 3"
    assert library.tango_swiglu_enqueue(0, HERE, HERE, 8, 1, 1.0, HERE, None) == BAD_ARGUMENT
    assert library.tango_last_error() == b"y_dtype is 1: it must be dtype, which is 0, or 2 or 3"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_exact(path, shape):
    Int8Product(*shape, path=path, device="cpu").check()


@pytest.fixture(scope="module")
def one_sm(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("one_sm"), "linear", "products", sms=1)


@pytest.mark.parametrize("shape", [(250, 80, 130), (250, 208, 144)])
def test_a_product_of_large_tiles_is_exact(one_sm, shape):
    """Where small ones would take twice as many rounds of the SM."""
    Int8Product(*shape, path=one_sm, device="cpu").check()


def test_rows_may_begin_anywhere(path):
    product = Int8Product(3, 64, 128, path=path, device="cpu")
    apart = torch.zeros(product.x.numel() + 1, dtype=torch.int8)
    apart[1:] = product.x.flatten()
    assert product.enqueue(x=apart.data_ptr() + 1) == 0
    assert torch.equal(product.y[:-1], product.wanted())


def test_sums_that_fp32_does_not_hold_are_rounded_once(path):
    product = Int8Product(1, 1100, 8, path=path, device="cpu")
    product.x.fill_(-128)
    product.weight.fill_(-128)
    product.weight[-1] = torch.arange(8)
    product.check()


def test_no_rows_are_no_work(path):
    product = Int8Product(1, 16, 16, path=path, device="cpu")
    product.shape.rows = 0
    assert product.enqueue(x=None, y=None) == 0
    assert product.y.isnan().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": None}, "shape is null"),
        ({"matrix": None}, "matrix is null"),
        ({"x": None}, "x is null"),
        ({"y": None}, "y is null"),
        ({"y": HERE + 1}, "y is at"),
        ({"shape": structs.TangoLinearShape(-1, 32, 8)}, "rows is -1"),
        ({"shape": structs.TangoLinearShape(1, 0, 8)}, "inputs is 0"),
        ({"shape": structs.TangoLinearShape(1, 131072, 8)}, "inputs is 131072: it must be from 1 to 131071"),
        ({"shape": structs.TangoLinearShape(1, 32, 0)}, "outputs is 0"),
        ({"matrix": structs.TangoMatrix(None, HERE, None, 1, 0)}, "values is null"),
        ({"matrix": structs.TangoMatrix(HERE + 4, HERE, None, 1, 0)}, "values is at"),
        ({"matrix": structs.TangoMatrix(HERE, None, None, 1, 0)}, "scales is null"),
        ({"matrix": structs.TangoMatrix(HERE, HERE + 2, None, 1, 0)}, "scales is at"),
        ({"matrix": structs.TangoMatrix(HERE, HERE, None, 3, 32)}, "weights is 3: INT8 activations need 1"),
    ],
)
def test_bad_arguments_are_rejected(path, changed, message):
    product = Int8Product(1, 32, 8, path=path, device="cpu")
    assert product.enqueue(**changed) == BAD_ARGUMENT
    assert product.library.tango_last_error().decode().startswith(message)
