"""Norms on the GPU, against fp64."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.norms import HALF, SINGLE, TYPES, Rows, check

#: Widths of released models (SigLIP, Qwen2.5-VL's tower, decoders), the widest, and some that no vector fits.
SIZES = [
    (729, 1152),
    (333, 1280),
    (70, 896),
    (64, 3584),
    (9, 5120),
    (3, 8192),
    (9, 512),
    (1, 8),
    (31, 7),
    (5, 1153),
    (2, 8191),
]


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("types", TYPES[:4])
def test_sum_and_norm_equal_fp64(kind, size, types):
    check(Rows(kind, *size, types))


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_types_mix(types, offset):
    check(Rows("layer", 33, 1152, types, offset=offset))


@pytest.mark.parametrize("without", [("bias",), ("beta",), ("branch", "bias"), ("branch", "bias", "sum", "beta")])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_what_is_optional_may_be_null(kind, without):
    check(Rows(kind, 100, 1152, TYPES[2], without))


def test_the_variance_of_rows_far_from_zero():
    check(Rows("layer", 50, 1152, (SINGLE, SINGLE, SINGLE), ("branch", "bias"), mean=1000.0))


def test_outputs_may_be_inputs():
    apart, within = (Rows("rms", 400, 1280) for _ in range(2))
    assert apart.enqueue() == 0
    held = within.tensors
    assert within.enqueue(sum=held["residual"], y=held["branch"]) == 0
    assert torch.equal(held["residual"], apart.tensors["sum"])
    assert torch.equal(held["branch"], apart.tensors["y"])


def test_nothing_outside_of_the_outputs_is_written():
    found = Rows("layer", 31, 1152, offset=8)
    around = torch.full((8 + 31 * 1152 + 64,), -77.0, dtype=torch.float16, device="cuda")
    for name in ("sum", "y"):
        around.fill_(-77.0)
        assert found.enqueue(**{name: around[8:]}) == 0
        assert (torch.cat((around[:8], around[-64:])) == -77.0).all()
        assert (around[8:-64] != -77.0).any()


def test_the_same_bits_every_time():
    found = Rows("layer", 729, 1152, (HALF, HALF, HALF))
    assert found.enqueue() == 0
    first = found.tensors["y"].clone()
    for _ in range(100):
        found.tensors["y"].fill_(torch.nan)
        assert found.enqueue() == 0
        assert torch.equal(found.tensors["y"], first)


def test_a_graph_replays_it():
    found, other, graph = Rows("layer", 64, 1152), Rows("layer", 64, 1152, seed=1), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert found.enqueue() == 0
    assert other.enqueue() == 0
    for name in ("residual", "branch", "bias", "weight", "beta"):
        found.tensors[name].copy_(other.tensors[name])
    graph.replay()
    assert torch.equal(found.tensors["y"], other.tensors["y"])


def test_an_overflow_is_visible():
    found = Rows("layer", 4, 1152)
    found.tensors["residual"][2, 5] = torch.inf
    assert found.enqueue() == 0
    assert found.tensors["y"][2].isnan().any()
    assert found.tensors["y"][[0, 1, 3]].isfinite().all()
