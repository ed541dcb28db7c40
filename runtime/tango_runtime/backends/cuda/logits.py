"""Logits that stay on the device: greedy sampling takes eight bytes of them, random sampling all."""

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
    """The logits of one position, until the next pass overwrites them.

    Args:
        memory: fp32 [V].
        best: 8 bytes for the greatest of them.
        stream: The stream that computes them.

    Attributes:
        memory: As given.
        shape: Its shape.
    """

    def __init__(self, memory: DeviceArray, best: DeviceArray, stream: Stream) -> None:
        self.memory, self._best, self._stream = memory, best, stream
        self.shape = memory.shape

    def argmax(self) -> tuple[int, float]:
        """The greatest logit's index and value, found on the device; NaN is above all, ties go to the lower index."""
        enqueue_argmax(self.memory, self._best, self._stream)
        (found,) = self._stream.download(self._best).view(ARGMAX)
        return int(found["index"]), float(found["value"])

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self._stream.download(self.memory), dtype)


def enqueue_argmax(values: DeviceArray, best: DeviceArray, stream: Stream) -> None:
    """Finds the greatest of fp32 ``values`` [V] on the device, into 8 bytes that are as ``ARGMAX`` says.

    Raises:
        TangoError: There is no CUDA library, or CUDA failed.
    """
    library = _library()
    if library.tango_argmax_enqueue(values.address, values.shape[0], best.address, stream.handle) != 0:
        raise TangoError(f"greedy sampling failed: {library.tango_last_error().decode()}", "see: tango doctor")


@cache
def _library() -> ctypes.CDLL:
    return native_library.load()
