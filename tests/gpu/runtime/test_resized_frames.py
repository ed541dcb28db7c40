"""Frames resized on the GPU by the backend: the host's values, from host and device memory."""

from __future__ import annotations

import numpy as np
import pytest

from tango_runtime.backends.cuda.backend import open_stream
from tango_runtime.backends.cuda.device import Pool
from tango_runtime.backends.cuda.frames import FrameLoader
from tango_runtime.video import sample
from tango_runtime.video.preprocess import preprocess


@pytest.mark.parametrize("shape", [(32, 1080, 1920), (5, 1920, 1080), (7, 721, 1283)])
@pytest.mark.parametrize("size", [(384, 384), (364, 644)])
def test_large_frames_on_the_host(shape, size):
    stream = open_stream()
    load = FrameLoader(stream, Pool())
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for _ in range(2):
        batch = load([(float(i), frame) for i, frame in enumerate(frames)], len(frames), size)
        expected = preprocess(enumerate(map(np.asarray, frames)), size).host_frames
        np.testing.assert_array_equal(stream.download(batch.frames), expected)


def test_frames_on_the_device():
    torch = pytest.importorskip("torch", reason="PyTorch, which has frames on the GPU, is not installed")
    stream = open_stream()
    load = FrameLoader(stream, Pool())
    frames = torch.randint(0, 256, (12, 240, 320, 3), dtype=torch.uint8, device="cuda")
    expected = preprocess(sample(frames.cpu().numpy(), 4), (96, 96)).host_frames
    for source in (frames, [(float(i), frame) for i, frame in enumerate(frames)]):
        batch = load(sample(source, 4), 4, (96, 96))
        assert stream.traffic.uploads == 0
        np.testing.assert_array_equal(stream.download(batch.frames), expected)
