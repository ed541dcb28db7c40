"""Logits that stay on the device: greedy sampling takes eight bytes of them, random sampling all."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tango_plugins import TangoError, native_library
from tango_plugins.decoder import MAX_SEQUENCES
from tango_plugins.device_array import DeviceArray
from tango_plugins.structs import TangoArgmax
from tango_runtime.backends.cuda.device import HostPool, Stream

#: TangoArgmax of tango/argmax.h.
ARGMAX = np.dtype(TangoArgmax)


class Greatest:
    """The greatest of up to ``MAX_SEQUENCES`` rows of logits, which the GPU writes into the host's memory.

    Args:
        stream: The stream that computes the logits.

    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._found = HostPool().take((MAX_SEQUENCES,), ARGMAX)  # pinned, so a kernel itself can write there

    def address(self, index: int) -> int:
        """Where that of a row is, as ``ARGMAX`` says."""
        return int(self._found[index:].ctypes.data)

    def read(self, index: int) -> tuple[int, float]:
        """Index and value of the greatest of a row, once the GPU has found it."""
        return int(self._found[index]["index"]), float(self._found[index]["value"])

    def find(self, rows: Sequence[DeviceArray]) -> list[tuple[int, float]]:
        """Index and value of the greatest of each row, fp32 [V]; NaN is above all, ties go to the lower index.

        Waits for the stream.
        """
        to = DeviceArray(self.address(0), (len(rows), ARGMAX.itemsize), "uint8")
        enqueue_argmax(rows, to, self._stream)
        self._stream.count_download(to.nbytes)
        self._stream.synchronize()
        return [self.read(i) for i in range(len(rows))]


class DeviceLogits:
    """The logits of one position, until the next pass overwrites them.

    Args:
        memory: fp32 [V].
        greatest: Finds the greatest of them.
        stream: The stream that computes them.

    Attributes:
        memory: As given.
        shape: Its shape.
    """

    def __init__(self, memory: DeviceArray, greatest: Greatest, stream: Stream) -> None:
        self.memory, self._greatest, self._stream = memory, greatest, stream
        self.shape = memory.shape

    def argmax(self) -> tuple[int, float]:
        """The greatest logit's index and value, found on the device; NaN is above all, ties go to the lower index."""
        (found,) = self._greatest.find([self.memory])
        return found

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self._stream.download(self.memory), dtype)


class KnownLogits(DeviceLogits):
    """Logits whose greatest has been found, together with those of other sequences."""

    def __init__(self, memory: DeviceArray, greatest: Greatest, stream: Stream, found: tuple[int, float]) -> None:
        super().__init__(memory, greatest, stream)
        self._found = found

    def argmax(self) -> tuple[int, float]:
        """The greatest logit's index and value."""
        return self._found


class StepLogits(DeviceLogits):
    """Logits of a decode step, which finds the greatest itself, and after which the next step may begin.

    Args:
        memory: As of :class:`DeviceLogits`.
        greatest: As of :class:`DeviceLogits`.
        stream: As of :class:`DeviceLogits`.
        index: Which of ``greatest`` the step writes.
        run_ahead: Waits for the stream, and begins the step of the token found; False if it did neither.
    """

    def __init__(
        self, memory: DeviceArray, greatest: Greatest, stream: Stream, index: int, run_ahead: Callable[[], bool]
    ) -> None:
        super().__init__(memory, greatest, stream)
        self._index, self._run_ahead = index, run_ahead
        self._found: tuple[int, float] | None = None

    def argmax(self) -> tuple[int, float]:
        """The greatest logit's index and value, found on the device."""
        if self._found is None:  # else the stream has gone on
            self._stream.count_download(ARGMAX.itemsize)
            if not self._run_ahead():
                self._stream.synchronize()
            self._found = self._greatest.read(self._index)
        return self._found


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
