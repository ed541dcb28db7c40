"""A clip: pixels, facts and questions from one seed."""

from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tango_calibration.data.questions import Question
from tango_calibration.data.synthetic import ask, render, sight, tell
from tango_calibration.data.synthetic.scene import compose

Split = Literal["train", "validation", "test"]

_STREAMS = {"train": 1, "validation": 2, "test": 3}
_FRAMES, _CHANCES = (8, 16, 32, 64), (0.3, 0.35, 0.25, 0.1)


def make_clip(seed: int, split: Split, frames: int | None = None) -> "Clip":
    """The clip of a seed in a split.

    Args:
        seed: Any number from 0; the same seed gives different clips in different splits.
        split: Only "test" shows the pairs of `HELD_OUT`.
        frames: F, at least 8; None draws 8, 16, 32 or 64.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAMS[split],)))
    drawn = _FRAMES[int(np.searchsorted(np.cumsum(_CHANCES)[:-1], rng.random(), side="right"))]
    return Clip(rng, frames or drawn, held_out=split == "test")


class Clip:
    """A few scenes with moving, brief and lasting figures.

    Frames are sampled at even distances; what happens between two of them is defined as well, and can be rendered.

    Attributes:
        seconds: fp32 [F], when the frames are sampled.
        duration: In seconds.
        scenes: What is between the cuts.
        figures: In order of appearance.
    """

    def __init__(self, rng: np.random.Generator, frames: int, held_out: bool) -> None:
        self._interval = float(rng.uniform(0.4, 1.0))
        self.duration = frames * self._interval
        self.seconds: NDArray[np.float32] = ((np.arange(frames) + 0.5) * self._interval).astype(np.float32)
        self.scenes, self.figures = compose(rng, frames, held_out)
        self._held_out = held_out
        self._key = int(rng.integers(1 << 62))

    @cached_property
    def shown(self) -> NDArray[np.float32]:
        """fp32 [figures, F]: how much of each figure is seen in each sampled frame, of its area."""
        return sight.shown(self.scenes, self.figures, len(self.seconds))

    def render(self, seconds: ArrayLike | None = None) -> NDArray[np.uint8]:
        """The frames at some times, by default at the sampled ones.

        Args:
            seconds: [N], between 0 and `duration`.

        Returns:
            uint8 [N, 384, 384, 3], RGB.
        """
        times = np.asarray(self.seconds if seconds is None else seconds, np.float64) / self._interval - 0.5
        # Sampled times come as fp32: without rounding, their noise would depend on the last bit.
        times = np.round(times, 3).clip(-0.5, len(self.seconds) - 0.501)
        return render.render(self.scenes, self.figures, times, self._key)

    def facts(self, i: int) -> NDArray[np.int64]:
        """What is seen in frame `i`: [n, 4], as `tell.facts` gives it; `tell.phrase` puts it in words."""
        return tell.facts(self.scenes, self.figures, self.shown, i)

    def questions(self, rng: np.random.Generator, count: int) -> list[Question]:
        """Up to `count` different questions, each type once before any type twice."""
        return ask.questions(self.scenes, self.figures, self.shown, self._held_out, rng, count)

    def frame_questions(self, i: int, rng: np.random.Generator, count: int) -> list[Question]:
        """Up to `count` different questions about frame `i` by itself."""
        return ask.frame_questions(self.scenes, self.figures, self.shown, i, self._held_out, rng, count)
