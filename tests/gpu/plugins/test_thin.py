"""The kernels of inner pruning on a GPU, against the reference, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from tango_plugins import native_library
from tests.plugins.thinnings import CASES, DTYPES, Prompt

#: A prompt of LLaVA-Video-7B at a retention ratio of 0.1, among others.
LARGE = [(2426, 25, 1900, 950, 3584), (1200, 15, 1000, 300, 896)]


def run(prompt):
    assert prompt.enqueue(native_library.load(), torch.cuda.current_stream().cuda_stream) == 0
    torch.cuda.synchronize()
    return prompt


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + LARGE)
def test_rows_are_thinned_as_the_reference_does_it(case, dtype):
    run(Prompt(*case, dtype, "cuda")).check()


def test_ties_are_those_of_the_reference():
    run(Prompt(*CASES[0], torch.float32, "cuda", equal=True)).check()


def test_the_same_bits_on_every_run_and_in_a_cuda_graph():
    first, second = (run(Prompt(*LARGE[1], torch.float16, "cuda")) for _ in range(2))
    assert torch.equal(first.thinned, second.thinned)
    third, graph = Prompt(*LARGE[1], torch.float16, "cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert third.enqueue(native_library.load(), torch.cuda.current_stream().cuda_stream) == 0
    third.thinned.fill_(7.0)
    graph.replay()
    assert torch.equal(third.thinned, first.thinned)
