"""Rotation of a tower's queries and keys on the GPU, against fp64."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.patch_rotations import Rotation, Shape, check


@pytest.mark.parametrize(
    "shape", [Shape(16, 2880, 16, 80), Shape(4, 1008, 16, 80), Shape(1, 1, 1, 16), Shape(3, 70, 9, 128)], ids=str
)
def test_it_equals_fp64(shape):
    check(Rotation(shape))


def test_a_graph_replays_it():
    found, other, graph = Rotation(Shape(1, 64, 2, 80)), Rotation(Shape(1, 64, 2, 80), seed=1), torch.cuda.CUDAGraph()
    outputs, wanted = found.outputs(torch.half), other.outputs(torch.half)
    with torch.cuda.graph(graph):
        found.stream = torch.cuda.current_stream().cuda_stream
        assert found.enqueue(**outputs) == 0
    assert other.enqueue(**wanted) == 0
    for name, tensor in other.tensors.items():
        found.tensors[name].copy_(tensor)
    graph.replay()
    for name, tensor in wanted.items():
        assert torch.equal(outputs[name], tensor)
