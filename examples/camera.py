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
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import av

from tango_runtime import VideoLLM
from tango_runtime.video import Frame, TimedFrame


def frames_of(source: str) -> Iterator[TimedFrame]:
    """Endless (seconds, RGB frame [H, W, 3]) at the speed at which they are shown."""
    is_camera = not Path(source).is_file()
    while True:
        with av.open(source, format="v4l2" if is_camera else None) as container:
            start = None
            for frame in container.decode(video=0):
                shown = frame.time or 0.0
                # A recording may begin at any time of its own clock.
                start = time.monotonic() - shown if start is None else start
                if not is_camera:
                    time.sleep(max(0.0, start + shown - time.monotonic()))
                yield time.monotonic(), frame.to_ndarray(format="rgb24")
            if start is None:
                raise ValueError(f"{source} has no frames")


class LastSeconds:
    """The last seconds of a camera at a low frame rate, read by its own thread.

    Decoding never waits for the model: a question takes what the buffer holds at that moment. Memory is
    seconds · fps · H · W · 3 bytes: 60 MB for 16 s of 640×480 at 4 frames a second.

    Args:
        camera: (seconds, RGB frame [H, W, 3]), times ascending; it may reuse one buffer for all frames.
        seconds: Length of the buffer.
        fps: Frames a second in the buffer.
    """

    def __init__(self, camera: Iterable[TimedFrame], seconds: float, fps: float) -> None:
        self._seconds = seconds
        self._interval = 1 / fps
        self._frames: deque[TimedFrame] = deque()
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._closed = threading.Event()
        self.reader = threading.Thread(target=self._read, args=(camera,), daemon=True)
        self.reader.start()

    def window(self) -> list[TimedFrame]:
        """(seconds, frame) pairs, oldest first: a source whose frames stay when the buffer drops them."""
        if self._error:
            raise self._error
        with self._lock:
            return list(self._frames)

    def close(self) -> None:
        """Stops reading."""
        self._closed.set()
        self.reader.join()

    def _read(self, camera: Iterable[TimedFrame]) -> None:
        try:
            for timed in camera:
                self._keep(*timed)
                if self._closed.is_set():
                    return
        except Exception as error:  # raised by the main thread, which would otherwise wait for frames forever
            self._error = error

    def _keep(self, now: float, frame: Frame) -> None:
        with self._lock:
            if self._frames and now - self._frames[-1][0] < self._interval:
                return
            self._frames.append((now, frame.copy()))
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
    parser.add_argument("--answers", type=int, help="stop after this many answers (default: never)")
    args = parser.parse_args(arguments)
    if args.frames > args.seconds * args.fps:
        parser.error(f"a buffer of {args.seconds:g} s at {args.fps:g} fps never holds {args.frames} frames")

    llm = VideoLLM(args.bundle)
    with closing(LastSeconds(frames_of(args.source), args.seconds, args.fps)) as camera:
        answer(llm, camera, args)


def answer(llm: VideoLLM, camera: LastSeconds, args: argparse.Namespace) -> None:
    answered = 0
    while args.answers is None or answered < args.answers:
        window = camera.window()
        if len(window) < args.frames:  # just started
            time.sleep(0.1)
            continue
        asked = time.monotonic()
        print(f"[{window[-1][0] - window[0][0]:.1f} s] ", end="", flush=True)
        stream = llm.stream(window, args.question, frames=args.frames)
        for text in stream:
            print(text, end="", flush=True)
        print(f" ({stream.answer.kept} of {stream.answer.total} tokens)")
        answered += 1
        time.sleep(max(0.0, asked + args.every - time.monotonic()))


if __name__ == "__main__":
    main()
