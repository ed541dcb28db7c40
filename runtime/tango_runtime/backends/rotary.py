"""Rotary positions on three axes (time, row, column), as a Qwen2.5-VL decoder takes them beside the cache's slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_runtime.bundle import RotarySpec

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class RotaryIds:
    """The rotary positions of one sequence, by cache slot.

    Text has the same id on all axes. What pruning leaves of the video keeps its ids, and so does the text after it: it
    begins after the largest id of the whole video, and slot and id differ by a constant from there on.

    Attributes:
        before: Slots of the text before the video.
        video: Ids of the video's tokens in the prompt, [3, K].
        behind: Id of the first token after the video.
    """

    before: int
    video: Ids
    behind: int

    @classmethod
    def of(
        cls, spec: RotarySpec, before: int, shape: tuple[int, int, int], step_seconds: float, kept: NDArray[np.integer]
    ) -> RotaryIds:
        """The ids of a prompt.

        Args:
            spec: The decoder's.
            before: Tokens before the video.
            shape: Steps of frames, rows and columns of tokens.
            step_seconds: Seconds from one step of frames to the next.
            kept: [K], flat indices of the video's tokens that are in the prompt, ascending.
        """
        # In fp32, as transformers 4.49 does, which also rounds away what divisions left in the seconds.
        seconds = np.float32(step_seconds if spec.time_step == "seconds" else 1.0)
        times = (np.arange(shape[0], dtype=np.float32) * seconds * spec.tokens_per_second).astype(np.int64)
        step, row, column = np.unravel_index(kept, shape)
        last = max(int(times[-1]), shape[1] - 1, shape[2] - 1)
        return cls(before, before + np.stack((times[step], row, column)), before + last + 1)

    @property
    def offset(self) -> int:
        """Difference between the id of a token after the video and its slot; it may be negative."""
        return self.behind - self.before - self.video.shape[1]

    def at(self, begin: int, end: int) -> Ids:
        """Ids of the slots from ``begin`` up to ``end``, [3, end − begin]."""
        slots = np.arange(begin, end)
        ids = np.tile(np.where(slots < self.before, slots, slots + self.offset), (3, 1))
        inside = (slots >= self.before) & (slots < self.before + self.video.shape[1])
        ids[:, inside] = self.video[:, slots[inside] - self.before]
        return ids

    def require_room(self, context: int, positions: int) -> None:
        """Rejects a video whose ids, or those of what may follow it, the decoder was not made for.

        Args:
            context: Most slots.
            positions: Ids that the decoder was made for.

        Raises:
            TangoError: They go further.
        """
        last = context + max(self.offset, 0)
        if last > positions:
            raise TangoError(
                f"the video is so long that positions reach {last}, the decoder was made for {positions}",
                "take a shorter part of it",
            )


#: A sequence without a video: every token's ids are its slot.
TEXT = RotaryIds(0, np.zeros((3, 0), np.int64), 0)
