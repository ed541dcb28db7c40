"""Live windows: time from a question about the window to the first token, and many streams in one process.

    python -m benchmarks.bench_live BUNDLE [--window 32] [--questions 50] [--streams 8 --seconds 30] [--json FILE]

The frames of a question's window are already encoded. The window has changed since the last question, so it is pruned
and prefilled. Each stream yields one generated frame per second and is asked every 5 seconds. The lag is the time from
an answer's newest frame to its first piece. As in `tango bench`, pruning keeps exactly the bundle's share of the
tokens, whatever the weights are, and no answer ends by itself.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_server import spread
from tango_runtime import LiveVideo, VideoLLM
from tango_runtime.bench.conditions import gpu_state, machine
from tango_runtime.bench.measure import measurable
from tango_runtime.bundle import Bundle
from tango_runtime.video import TimedFrame

_QUESTION, _EVERY = "What happens?", 5.0


def frames(size: tuple[int, int], seed: int) -> Iterator[TimedFrame]:
    """An endless stream of a moving block over noise, one frame per second."""
    noise = np.random.default_rng(seed).integers(0, 255, (4, *size, 3), dtype=np.uint8)
    second = 0
    while True:
        frame = noise[second % 4].copy()
        left = 16 * second % (size[1] - 32)
        frame[32:64, left : left + 32] = 255
        yield float(second), frame
        second += 1


def paced(source: Iterator[TimedFrame], until: threading.Event, offset: float) -> Iterator[TimedFrame]:
    """Yields the frames of a source at their times, until an event is set."""
    begin = time.monotonic() + offset
    for seconds, frame in source:
        if until.wait(max(0.0, begin + seconds - time.monotonic())):
            return
        yield seconds, frame


def first_token(llm: VideoLLM, window: int, questions: int, size: tuple[int, int]) -> dict[str, Any]:
    """Milliseconds to encode a frame, and from a question to its first token."""
    encoded, asked = [], []
    with llm.live(frames(size, 0), window=window, drop=False) as live:
        while not live.window.full:
            live.take_in()
        for _ in range(questions + 3):
            begin = time.perf_counter()
            live.take_in()
            live.ask(_QUESTION, max_new_tokens=1)  # waits for all queued work, so that only the question is timed
            middle = time.perf_counter()
            live._seen = -1  # as if the window had changed
            stream = live.stream(_QUESTION, max_new_tokens=2)
            stream.turn()  # the first token, whether or not it completes a piece of text
            end = time.perf_counter()
            stream.close()
            asked.append(1e3 * (end - middle))
            encoded.append(1e3 * (middle - begin) - asked[-1])
        answer = stream.answer
    counts = {"kept": answer.kept, "total": answer.total, "prompt_tokens": answer.prompt_tokens}
    return counts | {"question_ms": spread(asked[3:]), "frame_ms": spread(encoded[3:])}


def many(llm: VideoLLM, window: int, streams: int, seconds: float, size: tuple[int, int]) -> dict[str, Any]:
    """Lags of the answers about many streams, in seconds."""
    until, lags, dropped = threading.Event(), [], 0
    lives: list[LiveVideo] = []
    for i in range(streams):
        camera = paced(frames(size, i), until, 1 + _EVERY * i / streams)
        lives.append(llm.live(camera, window=window))
    begin = time.monotonic()
    due = [begin + _EVERY + _EVERY * i / streams for i in range(streams)]
    while (now := time.monotonic()) < begin + seconds:
        busy = False
        for i, live in enumerate(lives):
            busy |= live.take_in(0)
            if now >= due[i] and live.window.held:
                answer = live.ask(_QUESTION, max_new_tokens=2)
                assert answer.live is not None
                lags.append(answer.live.lag or 0.0)
                due[i] += _EVERY
                busy = True
        if not busy:
            time.sleep(0.002)
    until.set()
    for live in lives:
        dropped += live.feed.dropped
        live.close()
    late = max((begin + seconds - at for at in due), default=0.0)
    return {"streams": streams, "answers": len(lags), "lag_s": spread(lags), "dropped": dropped, "behind_s": late}


def main() -> None:
    """Measures, and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--streams", type=int, nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    llm = VideoLLM(measurable(Bundle.load(args.bundle)), backend=args.backend)
    size = llm.bundle.manifest.video.size
    result: dict[str, Any] = {
        "bundle": args.bundle.resolve().name,
        "backend": llm.backend,
        "conditions": {"machine": machine(), "gpu_before": gpu_state()},
        "window": args.window,
        "one": first_token(llm, args.window, args.questions, size),
        "many": [many(llm, args.window, streams, args.seconds, size) for streams in args.streams],
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
