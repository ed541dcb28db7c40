"""Frames of a video file by this runtime and by the libraries that others use, where they are installed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tango_runtime.video import sample

#: Opens a file and reads frames by their indices, on so many threads: (file, indices, threads) → the number of frames.
Reader = Callable[[Path, list[int], int], int]


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def compare_sampling(video: Path, count: int, repeats: int) -> dict[str, list[float] | str]:
    """Milliseconds of reading evenly spaced frames of a file as RGB, each time anew; or why there are none.

    Args:
        video: The file.
        count: Number of frames.
        repeats: Measurements, after one that is not counted.
    """
    indices = np.linspace(0, _length(video) - 1, count).astype(int).tolist()
    found: dict[str, list[float] | str] = {}
    for name, reader in {"tango": _tango, "decord2": _decord, "torchcodec": _torchcodec}.items():
        try:
            times = []
            for _ in range(repeats + 1):
                begin = time.perf_counter()
                assert reader(video, indices, cores()) == count
                times.append(1e3 * (time.perf_counter() - begin))
            found[name] = times[1:]
        except ImportError:
            found[name] = "not installed"
        except Exception as error:  # a peer's: whatever it does not read
            found[name] = f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return found


def _length(video: Path) -> int:
    from tango_runtime.video.file import VideoFile

    return VideoFile(video).frames


def _tango(video: Path, indices: list[int], threads: int) -> int:
    return len(list(sample(video, len(indices))))


def _decord(video: Path, indices: list[int], threads: int) -> int:
    import decord

    return len(decord.VideoReader(str(video), num_threads=threads).get_batch(indices).asnumpy())


def _torchcodec(video: Path, indices: list[int], threads: int) -> int:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(video), num_ffmpeg_threads=threads, dimension_order="NHWC")
    return len(decoder.get_frames_at(indices).data)
