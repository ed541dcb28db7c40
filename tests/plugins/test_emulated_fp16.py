"""The product of fp16 matrices in the CUDA emulator: what surrounds cuBLASLt's product."""

from __future__ import annotations

import ctypes

import pytest

from tests.plugins.cuda_emulator import compiled
from tests.plugins.fp16 import GELU_SHAPES, LINEAR, LINEAR_GELU, SHAPES, Fp16Product

pytestmark = pytest.mark.nvcc

BAD_ARGUMENT = 1
HERE = 4096  # an aligned address, which is not read


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("fp16"), "products")


def small(path, **how):
    return Fp16Product(3, 16, 8, path=path, device="cpu", **how)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_fp64(path, shape):
    Fp16Product(*shape, path=path, device="cpu").check()


@pytest.mark.parametrize("shape", GELU_SHAPES)
def test_with_a_bias_and_gelu_it_equals_fp64(path, shape):
    Fp16Product(*shape, path=path, device="cpu").check(LINEAR_GELU)


def test_two_bytes_of_alignment_are_enough(path):
    small(path, skew=1).check()


def test_no_rows_are_no_work(path):
    product = small(path)
    product.shape.rows = 0
    assert product.enqueue(x=None, y=None) == 0
    assert product.y.isnan().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": None}, "x is null"),
        ({"x": HERE + 1}, "x is at"),
        ({"weight": None}, "weight is null"),
        ({"weight": HERE + 1}, "weight is at"),
        ({"y": None}, "y is null"),
        ({"y": HERE + 1}, "y is at"),
        ({"bias": None, "function": LINEAR_GELU}, "bias is null"),
        ({"bias": HERE + 2, "function": LINEAR_GELU}, "bias is at"),
        ({"x": HERE + 8, "function": LINEAR_GELU}, "x is at"),
    ],
)
def test_bad_arguments_are_rejected(path, changed, message):
    product = small(path)
    assert product.enqueue(**changed) == BAD_ARGUMENT
    assert product.library.tango_last_error().decode().startswith(message)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 16, 8), "rows is -1"),
        ((1, 0, 8), "inputs is 0"),
        ((1, 16, 0), "outputs is 0"),
        ((1, 16, (1 << 20) + 1), "outputs is 1048577"),
    ],
)
def test_bad_sizes_are_rejected(path, sizes, message):
    product = small(path)
    product.shape.rows, product.shape.inputs, product.shape.outputs = sizes
    assert product.enqueue() == BAD_ARGUMENT
    assert product.library.tango_last_error().decode().startswith(message)


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 12, 8), "inputs is 12: it must be"), ((3, 16, 4), "outputs is 4: it must be")]
)
def test_a_gelu_is_refused_where_the_sum_would_be_rounded_first(path, shape, message):
    product = Fp16Product(*shape, path=path, device="cpu")
    assert product.enqueue(LINEAR_GELU) == BAD_ARGUMENT
    assert product.library.tango_last_error().decode().startswith(message)


@pytest.mark.parametrize("function", [LINEAR, LINEAR_GELU])
def test_null_structs_are_rejected(path, function):
    product = small(path)
    call = getattr(product.library, function)
    for given, message in (((None, None), "shape is null"), ((product.shape, None), "tensors is null")):
        assert call(*given, None) == BAD_ARGUMENT
        assert product.library.tango_last_error().decode() == message


def test_the_version_of_cublaslt(path):
    library, version = small(path).library, ctypes.c_int32()
    assert library.tango_cublaslt_version(None) == BAD_ARGUMENT
    assert library.tango_cublaslt_version(ctypes.byref(version)) == 0
    assert version.value == 13  # as the emulator has it
