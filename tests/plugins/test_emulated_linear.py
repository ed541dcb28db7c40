"""The product of many rows with a quantized matrix in the CUDA emulator."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tango_plugins import native_library, structs
from tests.plugins.cuda_emulator import compiled
from tests.plugins.linears import SHAPES, SLABS, Product, check
from tests.plugins.matrices import FORMATS, INTERLEAVED, device_array, interleaved, quantized

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

BAD_ARGUMENT, SMALL_WORKSPACE = 1, 2
HERE = 4096  # an aligned address, which is not read


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("linear"), "linear", "products", sms=1)


@pytest.mark.parametrize("form", FORMATS)
def test_it_equals_fp64(library, form):
    check(Product(40, 160, 136, form, path=library, device="cpu"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["int8", "int4-32-zeros", "int4-128", "int8-128-zeros"])
def test_it_takes_odd_sizes(library, shape, form):
    check(Product(*shape, form, path=library, device="cpu"))


@pytest.mark.parametrize("form", [form for form in FORMATS if form.endswith(INTERLEAVED)])
@pytest.mark.parametrize("room", [0, 128])
def test_interleaved_blocks_equal_fp64(library, form, room):
    check(Product(10, 256, 144, form, path=library, device="cpu", room=room))


@pytest.mark.parametrize("form", ["int4-32-zeros", "int4-64", "int8-128-zeros"])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 48), (1000, 16), (256, 40), (32, 32)])
@pytest.mark.parametrize("tiles", [1, 2, 9])
def test_blocks_are_interleaved_in_place(library, form, inputs, outputs, tiles):
    matrix = quantized(torch.randn(inputs, outputs), form)
    wanted = interleaved(*(tensor.clone() for tensor in matrix.tensors[:2]))
    workspace = torch.zeros(tiles * 16 * matrix.tensors[0][0].numel(), dtype=torch.uint8)
    found = matrix.given.interleave("w", device_array(workspace), None, library)
    assert found.interleaved
    assert found.interleave("w", device_array(workspace), None, library) is found
    assert all(map(torch.equal, matrix.tensors, wanted))


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        ({"matrix": None}, BAD_ARGUMENT, "matrix is null"),
        ({"matrix": structs.TangoMatrix(HERE, HERE, None, 1, 0)}, BAD_ARGUMENT, "weights is 1"),
        ({"matrix": structs.TangoMatrix(HERE, HERE, None, 2, 32, 1)}, BAD_ARGUMENT, "interleaved is 1"),
        ({"matrix": structs.TangoMatrix(HERE, HERE, None, 2, 48)}, BAD_ARGUMENT, "group is 48"),
        ({"inputs": 0}, BAD_ARGUMENT, "inputs is 0"),
        ({"outputs": 0}, BAD_ARGUMENT, "outputs is 0"),
        ({"workspace": None}, BAD_ARGUMENT, "workspace is null"),
        ({"workspace": HERE + 8}, BAD_ARGUMENT, "workspace is at"),
        ({"workspace_bytes": 1023}, SMALL_WORKSPACE, "workspace has 1023 bytes: it must have 1024"),
    ],
)
def test_what_cannot_be_interleaved_is_rejected(library, changed, status, message):
    given = {"matrix": structs.TangoMatrix(HERE, HERE, None, 2, 32), "inputs": 128, "outputs": 16}
    given |= {"workspace": HERE, "workspace_bytes": 1024} | changed
    loaded = native_library.load(library)
    assert loaded.tango_interleave_enqueue(*given.values(), None) == status
    assert loaded.tango_last_error().decode().startswith(message)


def test_large_tiles_equal_fp64(library):
    """Where small ones would take twice as many rounds of the SM."""
    check(Product(250, 64, 130, "int4-32", path=library, device="cpu"))


@pytest.mark.parametrize("form", FORMATS)
def test_slabs_equal_fp64(library, form):
    check(Product(10, 160, 136, form, path=library, device="cpu", room=128))


@pytest.mark.parametrize("shape", SLABS)
@pytest.mark.parametrize("form", ["int8", "int4-32-zeros", "int4-128", "int8-128-zeros"])
def test_slabs_take_odd_sizes(library, shape, form):
    check(Product(*shape[:3], form, path=library, device="cpu", room=shape[3]))


@pytest.mark.parametrize("form", ["int4-32-zeros", "int8-32"])
def test_slabs_of_blocks_have_the_weights_of_the_registers(library, form):
    """Rows of the unit matrix read them."""
    products = [Product(64, 64, 130, form, path=library, device="cpu", room=room) for room in (0, 128)]
    for product in products:
        product.x.copy_(torch.eye(64))
        check(product)
    assert torch.equal(*(product.y[:-1] for product in products))


@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((0, 64, 40), 0),
        ((1, 64, 40), 40),
        ((9, 100, 72), 104 * 72 / 100),
        ((659, 3584, 18944), 18944),
        ((1, 3584, 152064), 16896),
    ],
)
def test_it_wants_room_for_a_slab(library, shape, outputs):
    product = Product(1, 32, 8, "int4-32", path=library, device="cpu")
    product.shape = structs.TangoLinearShape(*shape)
    assert product.wanted_workspace() == 2 * shape[1] * outputs


def test_it_wants_no_workspace_on_another_gpu(tmp_path):
    path = compiled(tmp_path, "linear", "products", capability=(8, 7))
    assert Product(100, 32, 8, "int4-32", path=path, device="cpu").wanted_workspace() == 0


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        ({"workspace": HERE + 8}, BAD_ARGUMENT, "workspace is at"),
        ({"workspace_bytes": 0}, SMALL_WORKSPACE, "workspace has 0 bytes: it must have 8192"),
        ({"workspace_bytes": 8191}, SMALL_WORKSPACE, "workspace has 8191 bytes: it must have 8192"),
    ],
)
def test_bad_workspaces_are_rejected(library, changed, status, message):
    product = Product(9, 32, 200, "int4-32", path=library, device="cpu", room=200)
    assert product.enqueue(**changed) == status
    assert product.library.tango_last_error().decode().startswith(message)


def test_bad_questions_for_a_workspace_are_rejected(library):
    product, size = Product(9, 32, 8, "int4-32", path=library, device="cpu"), ctypes.c_size_t()
    for shape, to, message in (
        (None, ctypes.byref(size), "shape is null"),
        (structs.TangoLinearShape(1, 0, 8), ctypes.byref(size), "inputs is 0"),
        (product.shape, None, "bytes is null"),
    ):
        assert product.library.tango_linear_workspace(shape, to) == BAD_ARGUMENT
        assert product.library.tango_last_error().decode().startswith(message)


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
