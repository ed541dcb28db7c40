"""Products of fp16 matrices by cuBLASLt, against fp64."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.fp16 import GELU_SHAPES, LINEAR, LINEAR_GELU, SHAPES, Fp16Product

#: Of a SigLIP tower with four frames, of the 0.5B and of the 7B: rows, inputs, outputs.
REAL = [
    *[(2916, 1152, 3456), (2916, 1152, 1152), (2916, 1152, 4304), (2916, 4304, 1152), (2916, 588, 1152)],
    *[(659, 896, 1152), (659, 896, 4864), (659, 4864, 896), (1, 896, 151936)],
    *[(659, 3584, 4608), (659, 3584, 18944), (659, 18944, 3584), (30, 18944, 3584), (1, 3584, 152064)],
]


@pytest.mark.parametrize("shape", [*SHAPES, *REAL])
def test_it_equals_fp64(shape):
    """Sums in fp16 would not."""
    Fp16Product(*shape).check()


@pytest.mark.parametrize("shape", [*GELU_SHAPES, *REAL[:4]])
def test_with_a_bias_and_gelu_it_equals_fp64(shape):
    Fp16Product(*shape).check(LINEAR_GELU)


@pytest.mark.parametrize("skew", [1, 4])
def test_tensors_begin_anywhere(skew):
    Fp16Product(70, 72, 40, skew=skew).check()


@pytest.mark.parametrize("rows", range(1, 140, 9))
def test_every_number_of_rows_has_its_plan(rows):
    product = Fp16Product(rows, 896, 1152)
    for _ in range(2):
        product.check()


def test_gelu_of_large_values_is_the_value_or_zero():
    product = Fp16Product(4, 16, 64)
    product.x.zero_()
    product.bias.copy_(torch.linspace(-65504, 65504, 64))
    assert product.enqueue(LINEAR_GELU) == 0
    found, large = product.y[:-1], product.bias.abs() > 10
    assert torch.equal(found[:, large], product.bias.relu().expand(4, -1)[:, large])


def test_nan_and_infinity_stay_in_their_row():
    product = Fp16Product(20, 64, 40)
    product.x[3, 5], product.x[7, 9] = torch.nan, torch.inf
    for function in (LINEAR, LINEAR_GELU):
        assert product.enqueue(function) == 0
        found = product.y[:-1]
        assert found[3].isnan().all()
        assert found[[i for i in range(20) if i not in (3, 7)]].isfinite().all()
        if function == LINEAR:
            assert not found[7].isfinite().any()


@pytest.mark.parametrize(("shape", "function"), [((659, 18944, 3584), LINEAR), ((2916, 1152, 4304), LINEAR_GELU)])
def test_the_same_bits_every_time(shape, function):
    product = Fp16Product(*shape)
    assert product.enqueue(function) == 0
    wanted = product.y.clone()
    for _ in range(100):
        product.y.fill_(torch.nan)
        assert product.enqueue(function) == 0
        assert torch.equal(product.y[:-1], wanted[:-1])


@pytest.mark.parametrize("function", [LINEAR, LINEAR_GELU])
def test_a_graph_captures_it_where_its_shape_is_new(function):
    product, graph = Fp16Product(661, 1152, 1152), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert product.enqueue(function) == 0
    graph.replay()
    torch.cuda.synchronize()
    wanted = product.y.clone()
    assert wanted[:-1].isfinite().all()
    product.check(function)
    assert torch.equal(product.y[:-1], wanted[:-1])
