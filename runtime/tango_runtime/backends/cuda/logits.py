"""Logits that stay on the device: greedy sampling takes eight bytes of them, random sampling all."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
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
        (found,) = find_argmax([self.memory], self._best, self._stream)
        return found

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self._stream.download(self.memory), dtype)


class KnownLogits(DeviceLogits):
    """Logits whose greatest has been found, together with those of other sequences."""

    def __init__(self, memory: DeviceArray, best: DeviceArray, stream: Stream, found: tuple[int, float]) -> None:
        super().__init__(memory, best, stream)
        self._found = found

    def argmax(self) -> tuple[int, float]:
        """The greatest logit's index and value."""
        return self._found


def find_argmax(rows: Sequence[DeviceArray], best: DeviceArray, stream: Stream) -> list[tuple[int, float]]:
    """Index and value of the greatest of each row, fp32 [V]; ``best`` has 8 bytes for each. Waits for the stream."""
    enqueue_argmax(rows, best, stream)
    found = stream.download(best).reshape(-1).view(ARGMAX)
    return [(int(each["index"]), float(each["value"])) for each in found]


def enqueue_argmax(rows: Sequence[DeviceArray], best: DeviceArray, stream: Stream) -> None:
    """Finds the greatest of each row on the device.

    Args:
        rows: From 1 to ``MAX_SEQUENCES`` rows, fp32 [V].
        best: 8 bytes for each, as ``ARGMAX`` says.
        stream: Where it runs.

    Raises:
        TangoError: There is no CUDA library, or CUDA failed.
    """
    library, addresses = _library(), (ctypes.c_void_p * len(rows))(*(row.address for row in rows))
    arguments = addresses, len(rows), rows[0].shape[0], best.address, stream.handle
    if library.tango_argmax_rows_enqueue(*arguments) != 0:
        raise TangoError(f"greedy sampling failed: {library.tango_last_error().decode()}", "see: tango doctor")


@cache
def _library() -> ctypes.CDLL:
    return native_library.load()
