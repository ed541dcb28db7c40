"""Frames that are ready for a vision graph, with their times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_plugins.device_array import DeviceArray


@dataclass(frozen=True, eq=False)
class FrameBatch:
    """All sampled frames of a video at the size that the vision graph takes.

    Attributes:
        frames: uint8 RGB [F, H, W, 3] on the host, or on the device of the backend that takes them. On the host of a
            GPU it is pinned memory, which stays pinned as long as the array or a view of it is kept; on the device it
            lasts until that backend loads other frames.
        seconds: float32 [F], time of each frame since the first frame of the source.
        aspect: Width over height of the source's first sampled frame, before it was resized.
    """

    frames: NDArray[np.uint8] | DeviceArray
    seconds: NDArray[np.float32]
    aspect: float

    def __len__(self) -> int:
        """Number of frames, F."""
        return self.frames.shape[0]

    @property
    def host_frames(self) -> NDArray[np.uint8]:
        """The frames, for what can only read the host's memory.

        Raises:
            TangoError: They are on a device.
        """
        if isinstance(self.frames, DeviceArray):
            raise TangoError("the frames are on a device", "copy them first: backend.to_host(batch.frames)")
        return self.frames
