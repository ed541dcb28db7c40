"""Logits that stay on the device: greedy sampling takes eight bytes of them, sampling by chance all."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tango_plugins import TangoError, native_library
from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.device import Stream, cudart

#: TangoGreatest of tango/argmax.h.
GREATEST = np.dtype([("index", np.int32), ("value", np.float32)])


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
        (found,) = self._stream.download(self._greatest).view(GREATEST)
        return int(found["index"]), float(found["value"])

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self._stream.download(self.memory), dtype)


def enqueue_argmax(values: DeviceArray, greatest: DeviceArray, stream: Stream) -> None:
    """Finds the greatest of fp32 ``values`` [V] on the device, into 8 bytes that are as ``GREATEST`` says.

    Raises:
        TangoError: There is no CUDA library, or CUDA failed.
    """
    status = _function()(values.address, values.shape[0], greatest.address, stream.handle)
    if status:
        name = cudart().cudaError_t(status).name
        raise TangoError(f"CUDA failed while looking for the greatest logit: {name}", "see: tango doctor")


@cache
def _function() -> Any:
    function = native_library.load().tango_argmax_enqueue
    function.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
    return function
