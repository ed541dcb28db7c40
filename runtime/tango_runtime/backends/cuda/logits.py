"""Logits that stay on the device: greedy sampling takes eight bytes of them, sampling by chance all."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tango_plugins import TangoError, native_library
from tango_plugins.device_array import DeviceArray
from tango_plugins.structs import TangoArgmax
from tango_runtime.backends.cuda.device import Stream

#: TangoArgmax of tango/argmax.h.
ARGMAX = np.dtype(TangoArgmax)


class DeviceLogits:
    """The logits of one position, until the engine's next pass overwrites them.

    Args:
        memory: fp32 [V].
        greatest: Room for the greatest of them, 8 bytes.
        stream: The stream that computes them.

    Attributes:
        memory: As given.
        shape: Its shape.
    """

    def __init__(self, memory: DeviceArray, greatest: DeviceArray, stream: Stream) -> None:
        self.memory, self._greatest, self._stream = memory, greatest, stream
        self.shape = memory.shape

    def greatest(self) -> tuple[int, float]:
        """The greatest logit's index and value, found on the device; NaN is above all, ties go to the lower index."""
        enqueue_argmax(self.memory, self._greatest, self._stream)
        (found,) = self._stream.download(self._greatest).view(ARGMAX)
        return int(found["index"]), float(found["value"])

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self._stream.download(self.memory), dtype)


def enqueue_argmax(values: DeviceArray, greatest: DeviceArray, stream: Stream) -> None:
    """Finds the greatest of fp32 ``values`` [V] on the device, into 8 bytes that are as ``ARGMAX`` says.

    Raises:
        TangoError: There is no CUDA library, or CUDA failed.
    """
    library = _library()
    if library.tango_argmax_enqueue(values.address, values.shape[0], greatest.address, stream.handle) != 0:
        raise TangoError(f"greedy sampling failed: {library.tango_last_error().decode()}", "see: tango doctor")


@cache
def _library() -> ctypes.CDLL:
    return native_library.load()
