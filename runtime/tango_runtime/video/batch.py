"""Frames that are ready for a vision graph, with their times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class FrameBatch:
    """All sampled frames of a video at the size that the vision graph takes.

    Attributes:
        frames: uint8 RGB [F, H, W, 3] on the host. A GPU backend's ``frame_buffer`` gives pinned memory, which stays
            pinned as long as the array or a view of it is kept.
        seconds: float32 [F], time of each frame since the first frame of the source.
        aspect: Width over height of the source's first sampled frame, before it was resized.
    """

    frames: NDArray[np.uint8]
    seconds: NDArray[np.float32]
    aspect: float

    def __len__(self) -> int:
        """Number of frames, F."""
        return len(self.frames)
