"""Answer questions about frames that a program makes itself: python frames.py BUNDLE QUESTION

Any iterable of (seconds, uint8 RGB frame [H, W, 3]) that is not a sequence is a camera: a driver's SDK, a queue, a
renderer. It is read on a thread of its own.
"""

import sys
import time
from collections.abc import Iterator

import numpy as np

from tango_runtime import VideoLLM

FPS, SECONDS = 10, 4


def camera() -> Iterator[tuple[float, np.ndarray]]:
    """In place of a driver: a square that moves over gray for four seconds, at the speed of a camera."""
    for i in range(FPS * SECONDS):
        frame = np.full((240, 320, 3), 128, np.uint8)
        frame[100:140, 7 * i : 7 * i + 40] = (230, 200, 0)
        time.sleep(1 / FPS)
        yield time.monotonic(), frame


bundle, question = sys.argv[1:]
for answer in VideoLLM(bundle).watch(camera(), question, window=4, fps=2, step=2, max_new_tokens=8):
    live = answer.live
    print(f"{answer.text}: {live.frames} frames, {live.dropped} dropped", flush=True)
