"""The gather of rows on the GPU, bit for bit, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from tango_plugins import native_library
from tests.plugins.rows import assert_gathered, gather, row_tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [3584, 896, 72, 5])
def test_rows_are_gathered_bit_for_bit(dtype, width):
    tensors = row_tensors(dtype, width, "cuda")
    assert gather(native_library.load(), *tensors, torch.cuda.current_stream().cuda_stream) == 0
    assert_gathered(*tensors)


def test_a_cuda_graph_replays_it():
    tensors = row_tensors(torch.float16, 64, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert gather(native_library.load(), *tensors, torch.cuda.current_stream().cuda_stream) == 0
    tensors[2].copy_(tensors[2].flip(0))
    graph.replay()
    assert_gathered(*tensors)
