"""A clip: pixels, facts and questions from one seed."""

from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tango_calibration.data.questions import Question
from tango_calibration.data.synthetic import facts, questions, render, visibility
from tango_calibration.data.synthetic.scene import compose

Split = Literal["train", "validation", "test"]

_STREAMS = {"train": 1, "validation": 2, "test": 3}
_FRAMES, _CHANCES = (8, 16, 32, 64), (0.3, 0.35, 0.25, 0.1)


def make_clip(seed: int, split: Split, frames: int | None = None) -> "Clip":
    """Makes the clip of a seed in a split.

    Args:
        seed: Any number from 0; splits have different clips for the same seed.
        split: Only "test" has the pairs of `HELD_OUT`.
        frames: F, at least 8; None draws 8, 16, 32 or 64.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAMS[split],)))
    drawn = _FRAMES[int(np.searchsorted(np.cumsum(_CHANCES)[:-1], rng.random(), side="right"))]
    return Clip(rng, frames or drawn, held_out=split == "test")


class Clip:
    """A few scenes with moving, brief and lasting figures.

    Frames are sampled uniformly. Times between two of them can be rendered too.

    Attributes:
        seconds: fp32 [F], times of the sampled frames.
        duration: Length in seconds.
        scenes: The scenes, separated by cuts.
        figures: The figures in order of appearance.
    """

    def __init__(self, rng: np.random.Generator, frames: int, held_out: bool) -> None:
        self._interval = float(rng.uniform(0.4, 1.0))
        self.duration = frames * self._interval
        self.seconds: NDArray[np.float32] = ((np.arange(frames) + 0.5) * self._interval).astype(np.float32)
        self.scenes, self.figures = compose(rng, frames, held_out)
        self._held_out = held_out
        self._key = int(rng.integers(1 << 62))

    @cached_property
    def visible(self) -> NDArray[np.float32]:
        """fp32 [figures, F]: visible share of each figure's area in each sampled frame."""
        return visibility.visible_shares(self.scenes, self.figures, len(self.seconds))

    def render(self, seconds: ArrayLike | None = None) -> NDArray[np.uint8]:
        """Renders frames at some times, by default at the sampled ones.

        Args:
            seconds: [N], between 0 and `duration`.

        Returns:
            uint8 [N, 384, 384, 3], RGB.
        """
        times = np.asarray(self.seconds if seconds is None else seconds, np.float64) / self._interval - 0.5
        # Sampled times are fp32. Without rounding, the noise of a frame would depend on the last bit of its time.
        times = np.round(times, 3).clip(-0.5, len(self.seconds) - 0.501)
        return render.render(self.scenes, self.figures, times, self._key)

    def facts(self, i: int) -> NDArray[np.int64]:
        """Facts about frame `i`, int64 [n, 4]; `phrase` puts one in words."""
        return facts.facts(self.scenes, self.figures, self.visible, i)

    def questions(self, rng: np.random.Generator, count: int) -> list[Question]:
        """Up to `count` different questions, each type once before any type twice."""
        return questions.questions(self.scenes, self.figures, self.visible, self._held_out, rng, count)

    def frame_questions(self, i: int, rng: np.random.Generator, count: int) -> list[Question]:
        """Up to `count` different questions about frame `i` alone."""
        return questions.frame_questions(self.scenes, self.figures, self.visible, i, self._held_out, rng, count)
