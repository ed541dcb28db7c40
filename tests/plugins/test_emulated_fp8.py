"""FP8 in the CUDA emulator: quantization, results of other kernels, and what surrounds cuBLASLt's product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tango_plugins import native_library
from tests.plugins.cuda_emulator import compiled
from tests.plugins.fp8 import (
    E4M3,
    FP32_SUMS,
    SHAPES,
    TANGO_FP8,
    Fp8Product,
    assert_rounded,
    bits,
    check_every_number,
    check_norm,
    rounded,
)
from tests.plugins.norms import HALF, SINGLE, Rows

pytestmark = pytest.mark.nvcc

BAD_ARGUMENT, CUDA_ERROR = 1, 3
HERE = 4096  # an aligned address, which is not read


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("fp8"), "products", "activation", "norm")


@pytest.fixture(scope="module")
def library(path):
    return native_library.load(path)


@pytest.mark.parametrize("scale", [1.0, 0.0123, 300.0])
def test_every_fp16_number_is_rounded_as_by_torch(library, scale):
    check_every_number(library, scale, "cpu")


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_fp32_is_quantized_up_to_its_end(library, size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    y = torch.full((size + 1,), torch.nan, dtype=torch.float32).to(E4M3)
    assert library.tango_quantize_enqueue(1, x.data_ptr(), size, TANGO_FP8, 0.1, y.data_ptr(), None) == 0
    assert torch.equal(bits(y)[:-1], bits(rounded(x, 0.1)))
    assert y[-1].isnan()


@pytest.mark.parametrize(("gelu", "form"), [(0, "none"), (1, "tanh")])
@pytest.mark.parametrize("shape", [(3, 64), (2, 13)])
def test_gelu_in_fp8(library, gelu, form, shape):
    x, bias = torch.randn(shape) * 4, torch.randn(shape[1])
    y = torch.empty(shape, dtype=E4M3)
    arguments = x.data_ptr(), bias.data_ptr(), *shape, TANGO_FP8, 0.02, y.data_ptr(), None
    assert library.tango_bias_gelu_enqueue(1, gelu, *arguments) == 0
    # In fp64: where it is nearly zero, what fp32 gives depends on the CPU, its sign too.
    wanted = torch.nn.functional.gelu(x.double() + bias.double(), approximate=form)
    assert_rounded(y, wanted.float(), 0.02)


@pytest.mark.parametrize("width", [48, 13])
def test_gated_activations_in_fp8(library, width):
    gate, up = (torch.randn(5, width, generator=torch.Generator().manual_seed(seed)).half() for seed in (0, 1))
    y, biased = (torch.empty(5, width, dtype=E4M3) for _ in range(2))
    zeros = torch.zeros(width).half()
    result = TANGO_FP8, 0.01
    pointers = gate.data_ptr(), up.data_ptr()
    assert library.tango_swiglu_enqueue(0, *pointers, gate.numel(), *result, y.data_ptr(), None) == 0
    gates = gate.data_ptr(), zeros.data_ptr(), up.data_ptr(), zeros.data_ptr()
    assert library.tango_bias_swiglu_enqueue(0, *gates, 5, width, 0.5, *result, biased.data_ptr(), None) == 0
    wide = torch.nn.functional.silu(gate.float()) * up.float()
    assert_rounded(y, wide, 0.01)
    assert_rounded(biased, wide / 2, 0.01)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("width", [192, 1280, 77])
@pytest.mark.parametrize("types", [(HALF, HALF), (SINGLE, HALF)])
def test_norms_in_fp8(path, kind, width, types):
    check_norm(*(Rows(kind, 3, width, (*types, SINGLE), path=path, device="cpu") for _ in range(2)))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_are_finite_and_above_zero(library, path, scale):
    rows = Rows("rms", 1, 8, path=path, device="cpu")
    product = Fp8Product(1, 16, 16, path=path, device="cpu")
    assert rows.enqueue(y_dtype=TANGO_FP8, y_scale=scale) == BAD_ARGUMENT
    assert library.tango_last_error().startswith(b"y_scale is ")
    assert library.tango_quantize_enqueue(0, HERE, 8, TANGO_FP8, scale, HERE, None) == BAD_ARGUMENT
    assert library.tango_last_error().startswith(b"y_scale is ")
    assert product.enqueue(x_scale=scale) == BAD_ARGUMENT
    assert library.tango_last_error().startswith(b"x_scale is ")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_equals_fp64(path, shape):
    Fp8Product(*shape, path=path, device="cpu").check(FP32_SUMS)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_with_gelu_equals_fp64(path, shape):
    Fp8Product(*shape, path=path, device="cpu").check_gelu(FP32_SUMS)


@pytest.mark.parametrize(("name", "address"), [("bias", None), ("bias", HERE + 2), ("y_factor", None)])
def test_gelu_needs_its_tensors(path, name, address):
    given = {"bias": HERE, "y_factor": HERE, name: address}
    product = Fp8Product(1, 16, 16, path=path, device="cpu")
    assert product.enqueue(function="tango_fp8_linear_gelu_enqueue", **given) == BAD_ARGUMENT
    assert product.library.tango_last_error().decode().startswith(f"{name} is ")


def test_no_rows_are_no_work(path):
    product = Fp8Product(1, 16, 16, path=path, device="cpu")
    product.shape.rows = 0
    assert product.enqueue(x=None, y=None) == 0
    assert product.y.isnan().all()


@pytest.mark.parametrize(
    ("shape", "changed", "message"),
    [
        ((1, 24, 16), {}, "inputs is 24: it must be a multiple of 16"),
        ((1, 16, 8), {}, "outputs is 8: it must be from 16"),
        ((-1, 16, 16), {}, "rows is -1"),
        ((1, 16, 16), {"x": None}, "x is null"),
        ((1, 16, 16), {"x": HERE + 8}, "x is at"),
        ((1, 16, 16), {"weight": HERE + 1}, "weight is at"),
        ((1, 16, 16), {"weight_scale": None}, "weight_scale is null"),
        ((1, 16, 16), {"y": None}, "y is null"),
    ],
)
def test_bad_arguments_are_rejected(path, shape, changed, message):
    product = Fp8Product(1, 16, 16, path=path, device="cpu")
    product.shape.rows, product.shape.inputs, product.shape.outputs = shape
    assert product.enqueue(**changed) == BAD_ARGUMENT
    assert product.library.tango_last_error().decode().startswith(message)


def test_older_gpus_get_an_error_that_says_what_to_use(tmp_path):
    product = Fp8Product(1, 16, 16, path=compiled(tmp_path, "products", capability=(8, 7)), device="cpu")
    assert product.enqueue() == CUDA_ERROR
    message = product.library.tango_last_error().decode()
    assert "this GPU has compute capability 8.7, and FP8 needs 8.9 or later; use INT8 or fp16" in message
