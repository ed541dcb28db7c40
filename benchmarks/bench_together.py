"""Answers at a time: how many tokens a second come of 1 to 8 answers that take turns, and of as many that share steps.

    python -m benchmarks.bench_together BUNDLE [--backend auto] [--counts 1 2 4 8] [--tokens 64] [--json FILE]

The answers are to different questions about one generated video, which is encoded and pruned once. All have their
first token before the clock starts. Then a token of each is taken in turn, to the end, which no stop token brings
about. Both ways give the same token ids up to the first difference that rounding makes; where that is, is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_runtime import VideoLLM
from tango_runtime.bench.conditions import gpu_state, machine
from tango_runtime.bench.measure import Case, make_clip, make_question, measurable
from tango_runtime.bundle import Bundle

WORDS = ("What", "Who", "Where", "When", "Why", "How", "Which", "Whose")


def answer(llm: VideoLLM, clip: NDArray[np.uint8], count: int, tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds from the first tokens of ``count`` answers to the ends of all, and their token ids."""
    with llm.session(clip, frames=len(clip)) as session:
        questions = [make_question(llm.bundle, word) for word in WORDS[:count]]
        streams = [session.stream(question, max_new_tokens=tokens) for question in questions]
        for stream in streams:
            stream.turn()
        begin, left = time.perf_counter(), streams
        while left:
            left = [stream for stream in left if stream.turn() is not None]
        return time.perf_counter() - begin, [stream.answer.ids for stream in streams]


def measure(llm: VideoLLM, clip: NDArray[np.uint8], counts: list[int], tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a token, tokens a second of all answers, and the ids of the last repeat, by number of answers."""
    found = {}
    for count in counts:
        times, ids = zip(*(answer(llm, clip, count, tokens) for _ in range(repeats + 1)), strict=True)
        seconds = statistics.median(times[1:])
        if any(each != ids[0] for each in ids):
            raise SystemExit("the same questions were answered differently")
        rate = count * (tokens - 1) / seconds
        found[str(count)] = {"step_ms": 1e3 * seconds / (tokens - 1), "tokens_per_second": rate, "ids": ids[-1]}
        print(f"  {count} at a time: {1e3 * seconds / (tokens - 1):.2f} ms a token of each, {rate:.0f} tokens/s")
    return found


def main() -> None:
    """Measures both ways, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--frames", type=int, help="of the video (default: the bundle's)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bundle = measurable(Bundle.load(args.bundle))
    height, width = bundle.manifest.video.size
    frames = args.frames or bundle.manifest.video.frames
    clip = make_clip(Case(prune=True, height=height, width=width), frames, 0)
    result: dict[str, Any] = {"bundle": args.bundle.resolve().name, "tokens": args.tokens, "frames": frames}
    for name, sequences in (("turns", 1), ("together", max(args.counts))):
        llm = VideoLLM(bundle, args.backend, sequences)
        print(f"{name}: {llm.backend}, {llm.sequences} sequences a step")
        result |= {"backend": llm.backend, name: measure(llm, clip, args.counts, args.tokens, args.repeats)}
        del llm
    result["same_tokens"] = {
        count: _same(*(result[name][count].pop("ids") for name in ("turns", "together"))) for count in result["turns"]
    }
    print("tokens before the first that differs:", result["same_tokens"])
    if args.json:
        conditions = {"machine": machine(), "gpu_before": gpu_state()}
        args.json.write_text(json.dumps(result | {"conditions": conditions}, indent=2) + "\n", "utf-8")


def _same(turns: list[list[int]], together: list[list[int]]) -> list[int]:
    """For each answer, how many of its first ids are the same in both."""
    return [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        for one, other in zip(turns, together, strict=True)
    ]


if __name__ == "__main__":
    main()
