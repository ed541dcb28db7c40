"""Colors, turn and resize of frames on the GPU, against NumPy and Pillow, bit for bit."""

from __future__ import annotations

import pytest
import torch

from tango_plugins import resize
from tests.plugins.resizes import SIZES, SURFACES, TURNS, Frames, Shape, check

#: Videos as cameras and sites give them, and what the released towers take.
VIDEOS = [
    (1080, 1920, 384, 384),
    (1920, 1080, 384, 384),
    (480, 854, 384, 384),
    (240, 426, 384, 384),
    (719, 1279, 364, 644),
    (2160, 3840, 336, 336),
    (384, 384, 384, 384),
    (1, 4099, 3, 7),
]


@pytest.mark.parametrize("size", [*SIZES, *VIDEOS])
def test_rgb_equals_pillow(size):
    check(Frames(Shape(*size, frames=3, gap=7, gap_rows=1)))


@pytest.mark.parametrize("turn", TURNS)
def test_a_frame_is_turned_before_it_is_resized(turn):
    check(Frames(Shape(161, 233, 97, 88, turn=turn)))
    check(Frames(Shape(161, 233, 97, 88, turn=turn, format=resize.NV12)))


@pytest.mark.parametrize("shape", SURFACES, ids=str)
def test_luma_and_chroma(shape):
    check(Frames(shape))


@pytest.mark.parametrize("kind", [resize.NV12, resize.P010])
@pytest.mark.parametrize("size", VIDEOS)
def test_videos(size, kind):
    check(Frames(Shape(*size, frames=2, format=kind, gap=64)))


def test_weights_are_those_of_any_size():
    for side in (*range(2, 60), 777, 1023, 5000, 16384):
        for out in (1, 3, 37, 384):
            check(Frames(Shape(2, side, 2, out), seed=side))


def test_a_graph_replays_it():
    frames = Frames(Shape(270, 480, 96, 96, frames=2))
    frames.enqueue()
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        frames.enqueue()
    frames.surrounded.fill_(123)
    graph.replay()
    torch.cuda.synchronize()
    assert (frames.result() == frames.expected()).all()
