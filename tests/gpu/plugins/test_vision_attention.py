"""Attention of a vision tower on the GPU, against fp64."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.vision_attentions import Shape, Vision, check, rotated_apart

#: Frames of the released towers (SigLIP so400m, Qwen2.5-VL), and grids and heads at the edges of the kernels' tiles.
SHAPES = [
    Shape(2, 27, 27, 16, 72),
    Shape(1, 36, 80, 4, 80),
    Shape(3, 14, 14, 6, 32),
    Shape(1, 1, 1, 1, 72),
    *(Shape(2, 1, tokens, 3, 72) for tokens in (63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 385)),
    *(Shape(2, 17, 19, 2, head_dim) for head_dim in (8, 40, 64, 80, 88, 120, 128)),
    Shape(40, 15, 10, 7, 72),  # more blocks than a GPU holds at once
    Shape(5, 16, 16, 40, 64),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [True, False])
def test_a_frame_equals_fp64(shape, packed):
    check(Vision(shape, packed), range(min(shape.frames, 3)))


@pytest.mark.parametrize("shape", [Shape(9, 27, 27, 16, 72), Shape(130, 12, 12, 2, 80), Shape(3, 60, 40, 2, 72)])
def test_every_frame_equals_fp64(shape):
    check(Vision(shape))


@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize(
    ("grid", "window"),
    [((36, 80), 8), ((20, 36), 8), ((13, 11), 4), ((7, 9), 1), ((40, 50), 16), ((50, 33), 24), ((9, 9), 100)],
)
def test_windows_equal_fp64(grid, window, head_dim):
    check(Vision(Shape(2, *grid, 2, head_dim, window)))


@pytest.mark.parametrize("shape", [Shape(2, 27, 27, 4, 72), Shape(1, 36, 80, 2, 80, window=8)])
def test_without_a_bias(shape):
    check(Vision(shape, has_bias=False))


#: Of Qwen2.5-VL's tower, and windows that are cut off, of other heads, and of fewer patches.
ROTATED = [
    Shape(16, 36, 80, 16, 80, window=8),
    Shape(3, 20, 36, 5, 80, window=8),
    Shape(2, 13, 11, 3, 64, window=4),
    Shape(40, 7, 9, 2, 128, window=8),
    Shape(2, 9, 9, 7, 16, window=3),
    Shape(5, 8, 8, 16, 80),
]


@pytest.mark.parametrize("shape", ROTATED, ids=str)
@pytest.mark.parametrize(("packed", "has_bias"), [(True, True), (False, True), (True, False)])
def test_with_a_rotation(shape, packed, has_bias):
    check(Vision(shape, packed, has_bias, rotates=True), range(min(shape.frames, 3)))


@pytest.mark.parametrize("shape", ROTATED, ids=str)
def test_a_rotation_before_gives_the_same_bits(shape):
    found = Vision(shape, rotates=True)
    apart = rotated_apart(found)
    assert (found.enqueue(), apart.enqueue()) == (0, 0)
    assert torch.equal(found.tensors["attn_out"], apart.tensors["attn_out"])


def test_whole_frames_after_a_rotation_equal_fp64():
    """Only their values have a bias, which Hopper's kernel adds."""
    whole = Vision(Shape(2, 36, 80, 4, 80), rotates=True)
    apart = rotated_apart(whole)
    apart.expected = whole.expected
    check(apart)


def test_keys_with_large_biases_overflow_nothing():
    found = Vision(Shape(2, 27, 27, 4, 72))
    found.bias[288:576:5] = 150.0
    found.bias[289:576:7] = -150.0
    found.bias[:288] *= 20
    check(found)


@pytest.mark.parametrize("shape", [Shape(2, 27, 27, 4, 72), Shape(1, 9, 7, 4, 80)])
def test_scores_far_apart(shape):
    """As with outliers: one key takes all of the weight, and the others underflow; scores reach thousands."""
    found = Vision(shape, scale=16.0)
    found.tensors["query"][5, 7] = found.tensors["key"][11, 7] = 3000.0
    check(found)


@pytest.mark.parametrize("shape", [Shape(8, 27, 27, 16, 72), Shape(2, 36, 80, 16, 80, window=8)])
def test_the_same_bits_every_time(shape):
    found = Vision(shape, rotates=shape.window > 0)
    assert found.enqueue() == 0
    first = found.tensors["attn_out"].clone()
    for _ in range(200):
        found.tensors["attn_out"].fill_(torch.nan)
        assert found.enqueue() == 0
        assert torch.equal(found.tensors["attn_out"].view(torch.int16), first.view(torch.int16))


@pytest.mark.parametrize("shape", [Shape(2, 27, 27, 2, 72), Shape(1, 20, 36, 2, 80, window=8)])
def test_nothing_outside_of_the_output_is_written(shape):
    found = Vision(shape, rotates=shape.window > 0)
    rows, width = found.tensors["attn_out"].shape
    around = torch.full((rows + 4, width), -77.0, dtype=torch.float16, device="cuda")
    assert found.enqueue(attn_out=around[2:]) == 0
    assert found.enqueue() == 0
    assert torch.equal(around[2:-2], found.tensors["attn_out"])
    assert (torch.cat((around[:2], around[-2:])) == -77.0).all()


def test_a_graph_replays_it():
    shape, graph = Shape(4, 27, 27, 16, 72), torch.cuda.CUDAGraph()
    found, other = Vision(shape), Vision(shape, seed=1)
    with torch.cuda.graph(graph):
        assert found.enqueue() == 0
    assert other.enqueue() == 0
    found.tensors["query"].copy_(other.tensors["query"])  # a packed tensor: its rows hold keys and values too
    found.bias.copy_(other.bias)
    graph.replay()
    assert torch.equal(found.tensors["attn_out"], other.tensors["attn_out"])


@pytest.mark.parametrize("shape", [Shape(1, 27, 27, 2, 72), Shape(1, 8, 7, 2, 72)])
def test_an_overflow_is_visible(shape):
    found = Vision(shape)
    found.tensors["query"][7, 3] = torch.inf
    assert found.enqueue() == 0
    attn_out = found.tensors["attn_out"]
    assert attn_out[7].isnan().any()
    assert attn_out[:7].isfinite().all()
    assert attn_out[8:].isfinite().all()
