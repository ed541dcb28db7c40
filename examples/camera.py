"""Answers a question about the last seconds of a camera, again and again.

    python examples/camera.py llava-ov-0.5b "What is the person doing?"
    python examples/camera.py llava-ov-0.5b "What is the person doing?" --source clip.mp4

A file in place of the camera plays at its own speed and starts over when it ends.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from tango_runtime import VideoLLM

Frame = tuple[float, NDArray[np.uint8]]


def frames_of(source: str) -> Iterator[NDArray[np.uint8]]:
    """RGB frames [H, W, 3] at the pace at which they are shown, without end."""
    is_camera = not Path(source).is_file()
    while True:
        with av.open(source, format="v4l2" if is_camera else None) as container:
            start = time.monotonic()
            for frame in container.decode(video=0):
                if not is_camera:
                    time.sleep(max(0.0, start + (frame.time or 0.0) - time.monotonic()))
                yield frame.to_ndarray(format="rgb24")


class LastSeconds:
    """The last seconds of a camera, so many frames of each, read by a thread of its own.

    Decoding never waits for the model: answering takes what the buffer holds at that moment. Memory is
    seconds · fps · H · W · 3 bytes: 60 MB for 16 s of 640×480 at 4 frames a second.
    """

    def __init__(self, source: str, seconds: float, fps: float) -> None:
        self._source = source
        self._seconds = seconds
        self._interval = 1 / fps
        self._frames: deque[Frame] = deque()
        self._lock = threading.Lock()
        self._error: Exception | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def snapshot(self) -> list[Frame]:
        """(seconds, frame) pairs, oldest first."""
        if self._error:
            raise self._error
        with self._lock:
            return list(self._frames)

    def _read(self) -> None:
        try:
            for frame in frames_of(self._source):
                self._keep(time.monotonic(), frame)
        except Exception as error:  # shown by the main thread, which would else wait for frames for ever
            self._error = error

    def _keep(self, now: float, frame: NDArray[np.uint8]) -> None:
        with self._lock:
            if self._frames and now - self._frames[-1][0] < self._interval:
                return
            self._frames.append((now, frame))
            while now - self._frames[0][0] > self._seconds:
                self._frames.popleft()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder that tango-export wrote")
    parser.add_argument("question")
    parser.add_argument("--source", default="/dev/video0", help="camera device or video file (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=16, help="frames the model sees (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=16, help="length of the buffer (default: %(default)s)")
    parser.add_argument("--fps", type=float, default=4, help="frames a second in the buffer (default: %(default)s)")
    parser.add_argument("--every", type=float, default=5, help="seconds between two answers (default: %(default)s)")
    parser.add_argument("--answers", type=int, help="stop after so many (default: never)")
    args = parser.parse_args(arguments)
    if args.frames > args.seconds * args.fps:
        parser.error(f"a buffer of {args.seconds:g} s at {args.fps:g} fps never holds {args.frames} frames")

    llm = VideoLLM(args.bundle)
    camera = LastSeconds(args.source, args.seconds, args.fps)
    answered = 0
    while args.answers is None or answered < args.answers:
        frames = camera.snapshot()
        if len(frames) < args.frames:  # just started
            time.sleep(0.1)
            continue
        asked = time.monotonic()
        print(f"[{frames[-1][0] - frames[0][0]:.1f} s] ", end="", flush=True)
        for text in llm.stream(frames, args.question, frames=args.frames):
            print(text, end="", flush=True)
        print()
        answered += 1
        time.sleep(max(0.0, asked + args.every - time.monotonic()))


if __name__ == "__main__":
    main()
