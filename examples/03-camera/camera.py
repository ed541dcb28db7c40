"""Answers a question about the last seconds of a camera, again and again.

    python examples/03-camera/camera.py llava-ov-0.5b "What is the person doing?"
    python examples/03-camera/camera.py llava-ov-0.5b "What is the person doing?" --source clip.mp4

A file in place of the camera plays at its own speed and starts over when it ends.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import av

from tango_runtime import VideoLLM
from tango_runtime.video import TimedFrame


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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder that tango-export wrote")
    parser.add_argument("question")
    parser.add_argument("--source", default="/dev/video0", help="camera device or video file (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=16, help="frames the model sees (default: %(default)s)")
    parser.add_argument("--fps", type=float, default=4, help="frames a second that it sees (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="time that they are spread over, whatever --fps says")
    parser.add_argument("--every", type=float, default=5, help="seconds between two answers (default: %(default)s)")
    parser.add_argument("--answers", type=int, help="stop after this many answers (default: never)")
    args = parser.parse_args(arguments)

    llm = VideoLLM(args.bundle)
    fps = args.frames / args.seconds if args.seconds else args.fps
    with llm.live(frames_of(args.source), window=args.frames, fps=fps) as live:
        for answer in islice(live.watch(args.question, step=args.every), args.answers):
            begin, end = answer.live.begin, answer.live.end
            print(f"[{end - begin:.1f} s] {answer.text} ({answer.kept} of {answer.total} tokens)", flush=True)


if __name__ == "__main__":
    main()
