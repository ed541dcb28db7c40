"""The product of many rows with a quantized matrix in the CUDA emulator."""

from __future__ import annotations

import pytest

from tango_plugins import structs
from tests.plugins.cuda_emulator import compiled
from tests.plugins.linears import SHAPES, Product, check
from tests.plugins.matrices import FORMATS

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

BAD_ARGUMENT = 1


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("linear"), "linear", sms=1)


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("linear_sm90"), "linear_sm90", sms=4)


@pytest.mark.parametrize("form", FORMATS)
def test_it_equals_fp64(library, form):
    check(Product(40, 160, 136, form, path=library, device="cpu"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["int8", "int4-32-zeros", "int4-128", "int8-128-zeros"])
def test_it_takes_odd_sizes(library, shape, form):
    check(Product(*shape, form, path=library, device="cpu"))


def test_large_tiles_equal_fp64(library):
    """Where small ones would take twice as many rounds of the SM."""
    check(Product(250, 64, 130, "int4-32", path=library, device="cpu"))


@pytest.mark.parametrize("form", FORMATS)
def test_hoppers_kernel_equals_fp64(hopper, form):
    check(Product(180, 160, 136, form, path=hopper, device="cpu"))


@pytest.mark.parametrize("shape", [(65, 32, 8), (170, 20, 33), (230, 300, 130), (66, 72, 128)])
@pytest.mark.parametrize("form", ["int8", "int4-32-zeros", "int4-128"])
def test_hoppers_kernel_takes_odd_sizes(hopper, shape, form):
    check(Product(*shape, form, path=hopper, device="cpu"))


def test_no_rows_are_no_work(library):
    product = Product(1, 32, 8, "int4-32", path=library, device="cpu")
    product.shape.rows = 0
    assert product.enqueue() == 0
    assert product.y.isnan().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": None}, "shape is null"),
        ({"matrix": None}, "matrix is null"),
        ({"x": None}, "x is null"),
        ({"y": None}, "y is null"),
        ({"shape": structs.TangoLinearShape(-1, 32, 8)}, "rows is -1"),
        ({"shape": structs.TangoLinearShape(1, 0, 8)}, "inputs is 0"),
        ({"shape": structs.TangoLinearShape(1, 32, 0)}, "outputs is 0"),
        ({"matrix": structs.TangoMatrix(None, 4096, None, 2, 32)}, "values is null"),
        ({"matrix": structs.TangoMatrix(4100, 4096, None, 2, 32)}, "values is at"),
        ({"matrix": structs.TangoMatrix(4096, None, None, 2, 32)}, "scales is null"),
        ({"matrix": structs.TangoMatrix(4096, 4098, None, 1, 0)}, "scales is at"),
        ({"matrix": structs.TangoMatrix(4096, 4096, None, 5, 32)}, "weights is 5"),
        ({"matrix": structs.TangoMatrix(4096, 4096, None, 2, 16)}, "group is 16: it must be 32, 64 or 128"),
        ({"matrix": structs.TangoMatrix(4096, None, None, 0, 0)}, "weights is 0: fp16 and FP8 are not taken"),
    ],
)
def test_bad_arguments_are_rejected(library, changed, message):
    product = Product(1, 32, 8, "int4-32", path=library, device="cpu")
    assert product.enqueue(**changed) == BAD_ARGUMENT
    assert product.library.tango_last_error().decode().startswith(message)
