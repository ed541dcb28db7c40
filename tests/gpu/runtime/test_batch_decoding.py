"""Processes of a batch that decode on the GPU: the frames of software, by one decoder for each file."""

from __future__ import annotations

import multiprocessing
from contextlib import closing

import av
import numpy as np
import pytest

from tango_runtime.batch.decoding import Decoders
from tango_runtime.bundle import Bundle
from tango_runtime.video import file
from tango_runtime.video.decoded import decode
from tango_runtime.video.shape import FrameOptions

#: So many pixels that a decoder of the GPU is worth its start.
HEIGHT, WIDTH, FRAMES = 1080, 1920, 70

OPTIONS = FrameOptions(frames=8)


@pytest.fixture
def manifest(folder):
    return Bundle.load(folder("fp32")).manifest


def write(path, encoder, pix_fmt="yuv420p"):
    """A texture that moves, with keyframes and frames that are reordered."""
    assert HEIGHT * WIDTH * FRAMES > file._WORTH
    texture = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 4, 3), dtype=np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    speed = {"deadline": "realtime", "cpu-used": "8"} if encoder == "libvpx-vp9" else {"preset": "ultrafast"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=24, options={**speed, "g": "30", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        for i in range(FRAMES):
            pixels = np.ascontiguousarray(texture[:, 4 * i : 4 * i + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("encoder", ["libx264", "libx265", "libvpx-vp9"])
def test_frames_are_those_of_software(manifest, tmp_path, encoder, capfd):
    path = write(tmp_path / "clip.mp4", encoder)
    wanted = decode(manifest, path, OPTIONS)
    with closing(Decoders(manifest, OPTIONS, 0, 2)) as decoders:
        decoders.ready(None)
        for future in [decoders.submit(path) for _ in range(4)]:
            found = future.result()
            np.testing.assert_array_equal(found.batch.host_frames, wanted.batch.host_frames)
            np.testing.assert_array_equal(found.batch.seconds, wanted.batch.seconds)
            np.testing.assert_array_equal(found.clock.seconds, wanted.clock.seconds)
            assert (found.shape, found.batch.aspect) == (wanted.shape, wanted.batch.aspect)
    assert "decoded in software" not in capfd.readouterr().err
    assert not multiprocessing.active_children()


def test_ten_bits_are_left_to_software(manifest, tmp_path, capfd):
    path = write(tmp_path / "clip.mp4", "libx265", "yuv420p10le")
    with closing(Decoders(manifest, OPTIONS, 0, 1)) as decoders:
        decoders.ready(None)
        found = decoders.submit(path).result()
    np.testing.assert_array_equal(found.batch.host_frames, decode(manifest, path, OPTIONS).batch.host_frames)
    assert f"warning: {path} is decoded in software: software converts its 10 bits" in capfd.readouterr().err
