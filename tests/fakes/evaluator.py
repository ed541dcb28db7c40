"""An evaluator whose answers are predictable, and videos for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tango_calibration.data.dataset import Video
from tango_calibration.data.questions import Question
from tango_calibration.evaluation.evaluate import trials_of
from tango_calibration.evaluation.methods import METHODS
from tango_plugins import PruneParams
from tango_runtime.video import sample
from tango_runtime.video.shape import ClipShape

PARAMS = PruneParams(grid=(4, 4), sink_positions=())
TRIALS = trials_of(METHODS, (0.1, 0.3))
HOW_MANY = "How many tokens?"
BRIGHT = "Which frame is bright?"


class Counter:
    """Encodes noise; its answers are the number of tokens and the brightest frame."""

    def __init__(self):
        self.seen, self.prefilled = 0, []

    def __str__(self):
        return "a counter"

    def open_video(self, source, frames):
        return sample(source, frames), ClipShape(frames, (8, 8), 1, (4, 4))

    def encode_video(self, frames):
        self.seen += 1
        self.bright = int(frames.mean(axis=(1, 2, 3)).argmax())
        rng = np.random.default_rng(self.bright)
        return rng.standard_normal((len(frames), 16, 12)).astype(np.float32), rng.random((len(frames), 16), np.float32)

    def answer(self, kept, shape, clock, questions):
        self.prefilled.append(len(kept.tokens))
        answers = {HOW_MANY: f"{len(kept.tokens)}.", BRIGHT: str(self.bright)}
        return [answers[question] for question in questions], 5.0


def video(name, bright, frames=4):
    """Frames, one of them bright, with two questions."""
    pixels = np.zeros((frames, 8, 8, 3), np.uint8)
    pixels[bright] = 200
    questions = Question("count", HOW_MANY, "64"), Question("when", BRIGHT, str(bright), tags=("brief",))
    return Video(name, pixels, frames, questions, (f"{name}#0", f"{name}#1"))


VIDEOS = [video(f"v{i}", i) for i in range(4)]


def untimed(records):
    """The records without the time of pruning, which differs between runs."""
    return [replace(record, prune_ms=0) for record in records]
