"""Products of many rows with quantized matrices, against fp64."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.linears import SHAPES, SLABS, Product, check
from tests.plugins.matrices import FORMATS, device_array, interleaved, quantized

#: Of the 0.5B and the 7B: rows, inputs, outputs.
REAL = [(659, 896, 1152), (659, 896, 4864), (659, 4864, 896), (659, 3584, 4608), (100, 18944, 3584), (1, 896, 152064)]


@pytest.mark.parametrize("shape", [*SHAPES, (700, 160, 300), *REAL])
@pytest.mark.parametrize("form", FORMATS)
def test_it_equals_fp64(shape, form):
    check(Product(*shape, form))


@pytest.mark.parametrize("shape", [*SLABS, *((*shape, 1280) for shape in REAL), (30, 3584, 18944, 4736)])
@pytest.mark.parametrize("form", FORMATS)
def test_slabs_equal_fp64(shape, form):
    check(Product(*shape[:3], form, room=shape[3]))


@pytest.mark.parametrize("form", ["int4-32-zeros", "int4-128", "int8-32"])
def test_slabs_of_blocks_have_the_weights_of_the_registers(form):
    """Rows of the unit matrix read them."""
    products = [Product(128, 128, 300, form, room=room) for room in (0, 128)]
    for product in products:
        product.x.copy_(torch.eye(128))
        check(product)
    assert torch.equal(*(product.y[:-1] for product in products))


@pytest.mark.parametrize("form", ["int4-32-zeros", "int8-128-zeros"])
def test_blocks_are_interleaved_in_place(form):
    matrix = quantized(torch.randn(18944, 3584, device="cuda"), form)
    wanted = interleaved(*(tensor.clone() for tensor in matrix.tensors[:2]))
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    matrix.given.interleave("w", device_array(workspace), torch.cuda.current_stream().cuda_stream)
    assert all(map(torch.equal, matrix.tensors, wanted))


def test_a_hopper_wants_a_slab():
    wanted = Product(659, 896, 4864, "int4-32").wanted_workspace()
    assert wanted == (2 * 896 * 4864 if torch.cuda.get_device_capability()[0] == 9 else 0)


@pytest.mark.parametrize("room", [0, 1280])
@pytest.mark.parametrize("form", ["int8", "int4-32"])
def test_the_same_bits_every_time(form, room):
    product = Product(659, 896, 4864, form, room=room)
    product.enqueue()
    wanted = product.y.clone()
    for _ in range(1000):
        product.enqueue()
    assert torch.equal(product.y[:-1], wanted[:-1])


@pytest.mark.parametrize("room", [0, 96])
def test_a_graph_captures_it(room):
    product, graph = Product(70, 128, 96, "int4-128", room=room), torch.cuda.CUDAGraph()
    assert product.enqueue() == 0
    wanted = product.y.clone()
    with torch.cuda.graph(graph):
        product.enqueue()
    product.y.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(product.y[:-1], wanted[:-1])


def test_nan_and_infinity_stay_in_their_row():
    product = Product(20, 64, 40, "int4-32")
    product.x[3, 5], product.x[7, 9] = torch.nan, torch.inf
    assert product.enqueue() == 0
    found = product.y[:-1]
    assert found[3].isnan().all()
    assert not found[7].isfinite().any()
    others = [i for i in range(20) if i not in (3, 7)]
    assert found[others].isfinite().all()
