"""What a video becomes: sizes within a budget of pixels, steps of two frames, and their times."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tango_plugins import PruneParams, TangoError
from tango_runtime.bundle import PixelBudget, VideoSpec, VisionSpec
from tango_runtime.video import Clock, sample
from tango_runtime.video.shape import ClipShape, FrameOptions, at_size, choose_size, open_clip, pixels_of, size_within
from tests.fakes.qwen25vl import frame_budget, grid_times, sample_indices, smart_resize

BUDGET = PixelBudget(28, 128 * 784, 768 * 784, int(128000 * 784 * 0.9))
QWEN = VideoSpec(32, (560, 1008), "bicubic", 720, 2, "nearest", BUDGET)
LLAVA = VideoSpec(32, (384, 384), "bicubic", 196, 1, "floor")
MANIFEST = SimpleNamespace(video=QWEN, params=PruneParams(grid=(20, 36), sink_positions=()))
EDGES = st.integers(20, 2200)


def size_of(height, width, frames=32, max_pixels=None):
    return choose_size(QWEN, frames, (height, width), max_pixels=max_pixels)


@pytest.mark.parametrize(
    ("frames", "source", "size"),
    [  # as qwen-vl-utils 0.0.8, 0.0.11 and 0.0.14 have them
        (32, (720, 1280), (560, 1008)),
        (64, (720, 1280), (560, 1008)),
        (768, (720, 1280), (336, 644)),
        (32, (360, 640), (364, 644)),
        (16, (480, 480), (476, 476)),
        (32, (1280, 720), (1008, 560)),
        (32, (14, 30), (224, 476)),
    ],
)
def test_sizes_of_qwens_recipe(frames, source, size):
    assert size_of(*source, frames) == size


@given(EDGES, EDGES, st.integers(1, 768))
def test_sizes_are_the_references(height, width, frames):
    assert size_of(height, width, frames) == smart_resize(height, width, most=frame_budget(frames))


@example(20, 20, 128 * 784)  # enlarged to the least, it would be 336x336
@given(EDGES, EDGES, st.integers(28 * 28, 10**6))
def test_a_callers_limit_counts_even_below_the_least(height, width, most):
    h, w = size_of(height, width, max_pixels=most)
    assert h % 28 == w % 28 == 0
    assert h * w <= min(most, 602112) or 28 in (h, w)


def test_the_pixels_that_frames_share():
    assert pixels_of(BUDGET, 32) == (100352, 602112)
    assert pixels_of(BUDGET, 768) == (100352, BUDGET.total_pixels / 768 * 2)
    assert pixels_of(BUDGET, 10**6) == (100352, 105369)  # 1.05 times the least, in whole pixels
    assert pixels_of(BUDGET, 32, 200_000) == (100352, 200_000)
    assert pixels_of(BUDGET, 32, 5000) == (1, 5000)


def test_frames_that_are_too_narrow():
    assert size_within(28, 784, 10**6, 10, 2000)[0] == 28
    with pytest.raises(TangoError, match="2010x10 are too narrow"):
        size_within(28, 784, 10**6, 10, 2010)


def test_who_says_the_size():
    assert choose_size(QWEN, 32, (720, 1280), asked=(84, 112)) == (84, 112)
    assert choose_size(QWEN, 32, (720, 1280), fixed=(84, 112)) == (84, 112)
    assert choose_size(QWEN, 32, None, asked=(84, 112), fixed=(84, 112)) == (84, 112)
    assert choose_size(LLAVA, 32, (720, 1280)) == choose_size(LLAVA, 32, None, asked=(384, 384)) == (384, 384)


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (QWEN, {"asked": (84, 100)}, "the frame size is 84x100, not made of multiples of 28"),
        (QWEN, {"asked": (0, 28)}, "the frame size is 0x28"),
        (QWEN, {"asked": (84, 112), "max_pixels": 5000}, "a frame size and most pixels of a frame were given"),
        (QWEN, {"asked": (84, 112), "fixed": (112, 84)}, "frames must be 112x84, as the engines were built"),
        (QWEN, {"max_pixels": 5000, "fixed": (112, 84)}, "frames must be 112x84, as the engines were built"),
        (QWEN, {}, "does not say how large its frames are"),
        (LLAVA, {"asked": (84, 112)}, "frames must be 384x384, as the bundle takes them"),
        (LLAVA, {"max_pixels": 5000}, "frames must be 384x384, as the bundle takes them"),
    ],
)
def test_sizes_that_cannot_be(video, options, message):
    with pytest.raises(TangoError, match=message):
        choose_size(video, 32, None, **options)


# Steps


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_two_frames_a_step_and_the_last_again(count):
    shape = ClipShape.of(MANIFEST, count, (84, 112))
    assert (shape.steps, shape.grid, shape.total) == (-(-count // 2), (3, 4), -(-count // 2) * 12)
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 84, 112, 3), np.uint8)
    steps = shape.as_steps(frames)
    assert steps.shape == (shape.steps, 2, 84, 112, 3)
    assert steps[:, :, 0, 0, 0].ravel().tolist() == [*range(count), *([count - 1] if count % 2 else [])]
    assert np.shares_memory(steps, frames) == (count % 2 == 0)


def test_a_step_of_one_frame_is_the_frame():
    shape = ClipShape(5, (384, 384), 1, (14, 14))
    frames = np.zeros((5, 384, 384, 3), np.uint8)
    assert shape.as_steps(frames) is frames
    assert (shape.steps, shape.total, shape.rows(row_ends=True)) == (5, 5 * 196, 5 * (196 + 14))
    seconds = np.arange(5, dtype=np.float32)
    assert shape.step_seconds(seconds) is seconds


@pytest.mark.parametrize("count", [1, 2, 3, 7, 32, 33])
def test_times_are_stretched_over_the_steps(count):
    """The first and the last time are kept, as in the code of Tango's authors: it is not the mean of each pair."""
    seconds = (np.random.default_rng(count).random(count).cumsum() * 3).astype(np.float32)
    found = ClipShape(count, (28, 28), 2, (1, 1)).step_seconds(seconds)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, grid_times(seconds), rtol=1e-6)
    assert found[0] == seconds[0]
    assert len(found) == 1 or found[-1] == seconds[-1]


def test_seconds_from_step_to_step():
    shape = ClipShape(8, (28, 28), 2, (1, 1))
    assert shape.seconds_per_step(Clock(np.arange(8) * 1.0, 40.0)) == 10.0
    assert shape.seconds_per_step(Clock(np.arange(8) * 0.5, None)) == 1.0  # as the sampled frames say
    assert ClipShape(1, (28, 28), 2, (1, 1)).seconds_per_step(Clock(np.zeros(1), None)) == 0.0


@pytest.mark.parametrize(("n", "count"), [(100, 7), (90, 32), (8, 8), (6, 4)])
def test_a_clip_is_sampled_by_rounding(n, count):
    video = np.zeros((n, 36, 64, 3), np.uint8)
    stream, shape = open_clip(MANIFEST, video, FrameOptions(count, fps=2.0))
    assert (stream.clock.seconds * 2).tolist() == sample_indices(n, count).tolist()
    assert stream.frame_size == (36, 64)
    assert shape.size == size_of(36, 64, count)
    floored = sample(video, count, fps=2.0)
    assert (floored.clock.seconds * 2).tolist() == np.floor(np.linspace(0, n - 1, count)).tolist()


def test_a_bundle_at_another_size():
    vision = VisionSpec(32, 1280, 3420, 16, 2880, (0, 1), "gated", 4, 64)
    video, tower, params = at_size(QWEN, vision, MANIFEST.params, (336, 588))
    assert (video.size, video.tokens_per_frame, tower.patches, params.grid) == ((336, 588), 252, 1008, (12, 21))
    assert at_size(video, tower, params, (560, 1008)) == (QWEN, vision, MANIFEST.params)
    llava = PruneParams()
    assert at_size(LLAVA, vision, llava, (384, 384)) == (LLAVA, vision, llava)
    with pytest.raises(TangoError, match="as the bundle takes them"):
        at_size(LLAVA, vision, llava, (336, 588))
