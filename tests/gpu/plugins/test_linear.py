"""Products of many rows with quantized matrices, against fp64."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.linears import SHAPES, Product, check
from tests.plugins.matrices import FORMATS

#: Of the 0.5B and the 7B: rows, inputs, outputs.
REAL = [(659, 896, 1152), (659, 896, 4864), (659, 4864, 896), (659, 3584, 4608), (100, 18944, 3584), (1, 896, 152064)]


@pytest.mark.parametrize("shape", [*SHAPES, (700, 160, 300), *REAL])
@pytest.mark.parametrize("form", FORMATS)
def test_it_equals_fp64(shape, form):
    check(Product(*shape, form))


@pytest.mark.parametrize("form", ["int8", "int4-32"])
def test_the_same_bits_every_time(form):
    product = Product(659, 896, 4864, form)
    product.enqueue()
    wanted = product.y.clone()
    for _ in range(1000):
        product.enqueue()
    assert torch.equal(product.y[:-1], wanted[:-1])


def test_a_graph_captures_it():
    product, graph = Product(70, 128, 96, "int4-128"), torch.cuda.CUDAGraph()
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
