"""Clips whose frames have their number in their pixels, so that a test sees which frame it got."""

from __future__ import annotations

import av
import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime.video import sample

BITS = 8
H264 = {"bf": "3", "g": "12", "sc_threshold": "0"}
OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3"


def picture(number: int) -> np.ndarray:
    """A gray frame [48, 64, 3] with one black or white column of 8 pixels for each bit of its number."""
    bits = [(number >> b & 1) * 255 for b in range(BITS)]
    return np.repeat(np.broadcast_to(np.repeat(np.uint8(bits), 8)[None, :, None], (48, 64, 1)), 3, axis=2)


def number_in(rgb: np.ndarray) -> int:
    columns = rgb[:, :, 1].reshape(48, BITS, 8).mean(axis=(0, 2))
    return sum(int(column > 127) << b for b, column in enumerate(columns))


def write(path, encoder="libx264", options=None, times=range(60), muxer=None, draw=picture):
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(encoder, rate=24, options=options or H264)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count = 1  # libvpx's threads would wait for each other by spinning
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(draw(i), format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def show(path, a, b, c, d):
    """Gives an MP4 a display matrix: its pixel (x, y) is shown at (a·x + c·y, b·x + d·y)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # past version, times, track, duration, layer, group, volume
    one = 1 << 16
    data[at : at + 36] = np.array([a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(data)


def decode_all(path):
    """Every frame of the video, as a player that starts at the beginning shows them."""
    frames = []
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.video[0]):
            try:
                frames += [f.to_ndarray(format="rgb24") for f in packet.decode()]
            except av.InvalidDataError:
                continue
    return frames


def rejected(source, count, *words, **options):
    with pytest.raises(TangoError) as error:
        list(sample(source, count, **options))
    for word in words:
        assert word in str(error.value)
