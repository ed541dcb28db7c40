"""Frames of a long recording: seconds, processor time and memory of sampling, each in a new process.

    python -m benchmarks.bench_video [--hours 10] [--fps 1] [--frames 32] [--file FILE.mp4 …]

Without a file it makes one (H.264, 640×360, a keyframe every 60 frames), which takes minutes.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from tango_runtime.video import Sampling, sample


def main() -> None:
    """Starts a process for each measurement; with ``--sampling``, is such a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=10)
    parser.add_argument("--fps", type=int, default=1)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--file", type=Path, nargs="+")
    parser.add_argument("--sampling", choices=["exact", "keyframes"], help="one measurement, in this process")
    args = parser.parse_args()
    if args.sampling:
        print(_measure(args.file[0], args.frames, args.sampling))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = args.file or [_record(Path(folder) / "recording.mp4", int(args.hours * 3600 * args.fps), args.fps)]
        for file in files:
            print(f"{file.name}, {file.stat().st_size / 1e6:.0f} MB")
            for sampling in ("exact", "keyframes"):
                command = [sys.executable, __file__, "--file", file, "--frames", args.frames, "--sampling", sampling]
                found = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
                print(f"  {sampling:<10}{found.stdout.strip()}")


def _measure(file: Path, frames: int, sampling: Sampling) -> str:
    wall, processor = time.perf_counter(), time.process_time()
    stream = sample(file, frames, sampling=sampling)
    opened = time.perf_counter() - wall
    read = len(list(stream))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    off = "" if stream.off is None else f", at most {np.abs(stream.off).max():.0f} s off"
    return f"{read} frames: {wall:.2f} s (open {opened:.2f}), {processor:.2f} s of processor, {peak:.0f} MB peak{off}"


def _record(file: Path, count: int, fps: int) -> Path:
    """Writes changing noise over a gradient."""
    tiles = np.random.default_rng(0).integers(0, 256, (8, 360, 640), dtype=np.uint8) // 26
    base, chroma = np.linspace(0, 120, 640, dtype=np.uint8), np.full((180, 640), 128, np.uint8)
    options = {"preset": "ultrafast", "bf": "2", "g": "60", "crf": "33", "b_strategy": "0"}
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for i in range(count):
            luma = base + np.roll(tiles[i % 8], i % 97, 1)
            frame = av.VideoFrame.from_ndarray(np.vstack([luma, chroma]), format="yuv420p")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


if __name__ == "__main__":
    main()
