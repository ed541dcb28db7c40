"""CUDA for the stages: memory, one stream whose copies are counted, and graphs; thin over cuda-bindings 12 and 13.

Tensors on the device are :class:`tango_plugins.device_array.DeviceArray`: an address, a shape and a dtype. A
:class:`Buffer` owns their bytes.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tango_plugins import TangoError
from tango_plugins.device_array import DeviceArray

#: TensorRT takes tensors at multiples of this many bytes (setTensorAddress in NvInferRuntime.h); so does everybody.
ALIGNMENT = 256

#: Bytes of a file that a thread reads and copies to the device at a time, and threads: four copied twice as fast as one
#: on an H200's host.
_CHUNK_BYTES, _READERS = 1 << 22, 4

#: Unused blocks of pinned memory that a pool keeps: no answer takes more at a time.
_MAX_FREE_BLOCKS = 4

#: Bytes of pinned memory for small device-to-host copies: into pageable memory, each takes a few microseconds longer.
_STAGING_BYTES = 1 << 12

#: Most uploads that are kept alive without a wait; an answer that ends in a token waits after about four.
MAX_UPLOADS = 16


@cache
def cudart() -> Any:
    """The CUDA runtime, ``cuda.bindings.runtime``.

    Raises:
        TangoError: cuda-bindings is not installed, there is no GPU, or its driver is too old.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise TangoError("cuda-bindings is not installed", "pip install 'tango-edge[gpu]'") from error
    try:
        status, count = runtime.cudaGetDeviceCount()
    except RuntimeError as error:  # there is no libcuda to ask
        raise TangoError(f"there is no NVIDIA driver: {error}", "install one; see: tango doctor") from error
    if int(status) or not count:
        raise TangoError(f"no NVIDIA GPU can be used: {status.name}", "see: tango doctor")
    return runtime


def check(result: tuple[Any, ...]) -> Any:
    """The results of a call of the CUDA runtime after its status: nothing, a value, or a tuple of several.

    Raises:
        TangoError: The status is an error.
    """
    status, *values = result
    if int(status):
        text = cudart().cudaGetErrorString(status)[1].decode()
        raise TangoError(f"CUDA failed: {text} ({status.name})", "see: tango doctor")
    return tuple(values) if len(values) > 1 else values[0] if values else None


def rows(memory: DeviceArray, begin: int, end: int) -> DeviceArray:
    """``memory[begin:end]``, along the first axis."""
    row = replace(memory, shape=memory.shape[1:]).nbytes
    return DeviceArray(memory.address + begin * row, (end - begin, *memory.shape[1:]), memory.dtype)


class Buffer:
    """Device memory, zero at first, freed when nothing refers to it.

    Args:
        size: Bytes.

    Raises:
        TangoError: The device has not so much left.
    """

    def __init__(self, size: int) -> None:
        runtime = cudart()
        self.size = max(size, ALIGNMENT)  # an empty tensor has an address too
        status, address = runtime.cudaMalloc(self.size)
        if status == runtime.cudaError_t.cudaErrorMemoryAllocation:
            runtime.cudaGetLastError()  # or the next call would report it again
            free, total = check(runtime.cudaMemGetInfo())
            raise TangoError(
                f"the GPU has {free / 1e6:.0f} of {total / 1e6:.0f} MB left, {self.size / 1e6:.0f} MB are needed",
                "end other programs on the GPU, use fewer frames, or build engines with a smaller --context",
            )
        check((status,))
        self.address = int(address)
        self._free = _when_gone(self, runtime.cudaFree, self.address)
        check(runtime.cudaMemset(self.address, 0, self.size))
        check(runtime.cudaStreamSynchronize(0))  # the stages' stream does not wait for this one

    def view(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Its beginning as a tensor."""
        return DeviceArray(self.address, shape, np.dtype(dtype).name)

    def free(self) -> None:
        """Gives the memory back now."""
        self._free()


def upload_file(file: Path, given_up: threading.Event) -> Buffer:
    """Copies a file into device memory, whole; it is there when this returns, for every stream.

    Args:
        file: The file.
        given_up: Ends the copy early when it is set.

    Raises:
        TangoError: The device has not enough memory left, the host none that can be locked, or the file became shorter.
    """
    runtime, size = cudart(), file.stat().st_size
    buffer, kind = Buffer(size), runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    begins = deque(range(0, size, _CHUNK_BYTES))

    def read(_: int) -> None:
        locked = PinnedBlock(_CHUNK_BYTES)  # from other memory, a driver would copy it once more
        window = memoryview((ctypes.c_uint8 * _CHUNK_BYTES).from_address(locked.address)).cast("B")
        with file.open("rb") as source:
            while not given_up.is_set():
                try:
                    begin = begins.popleft()
                except IndexError:  # another reader has the last
                    return
                piece = window[: size - begin]
                source.seek(begin)
                if source.readinto(piece) != len(piece):
                    raise TangoError(f"{file} became shorter while it was read", "copy the bundle again")
                check(runtime.cudaMemcpy(buffer.address + begin, locked.address, len(piece), kind))

    def read_or_end(reader: int) -> None:
        try:
            read(reader)
        except BaseException:
            begins.clear()  # the other readers end too
            raise

    with ThreadPoolExecutor(_READERS) as threads:
        list(threads.map(read_or_end, range(_READERS)))
    return buffer


class Pool:
    """Buffers by name, each as large as the largest tensor that was ever asked of it: memory grows to a peak, once."""

    def __init__(self) -> None:
        self._buffers: dict[str, Buffer] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """A tensor in the buffer of that name; it lasts until the name is asked for again.

        Raises:
            TangoError: The device has not enough memory left.
        """
        size, held = math.prod(shape) * np.dtype(dtype).itemsize, self._buffers.get(name)
        if held is None or held.size < size:
            if held is not None:
                del self._buffers[name]
                held.free()  # cudaFree waits for the work that uses it
            held = self._buffers[name] = Buffer(size)
        return held.view(shape, dtype)


class HostPool:
    """Pinned memory of the host: a GPU reads it by itself, at full speed, while the host goes on.

    Locking memory takes longer than copying it, so a piece is used again when no array refers to it any more; few are
    kept for that, and the others given back. Who keeps an array keeps its memory locked.

    Args:
        least: Bytes that a piece has at least.
    """

    def __init__(self, least: int = 0) -> None:
        self._least = least
        self._free: deque[PinnedBlock] = deque(maxlen=_MAX_FREE_BLOCKS)

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array that is not initialized.

        Raises:
            TangoError: The host has not enough memory left.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        piece = self._free.pop() if self._free else None
        if piece is None or piece.size < size:
            piece = PinnedBlock(max(size, self._least))
        window = (ctypes.c_uint8 * size).from_address(piece.address)  # every view of the array holds it
        _when_gone(window, self._free.append, piece)
        return np.frombuffer(memoryview(window), dtype).reshape(shape)


class PinnedBlock:
    """Pinned memory of the host, freed when nothing refers to it."""

    def __init__(self, size: int) -> None:
        runtime = cudart()
        status, address = runtime.cudaMallocHost(size)
        if status == runtime.cudaError_t.cudaErrorMemoryAllocation:
            runtime.cudaGetLastError()  # or the next call would report it again
            raise TangoError(
                f"the host has no {size / 1e6:.1f} MB of memory left that can be locked for the GPU",
                "end other programs, use fewer frames, or keep fewer answers' frames",
            )
        check((status,))
        self.size, self.address = size, int(address)
        _when_gone(self, runtime.cudaFreeHost, self.address)


@dataclass
class TransferStats:
    """What has crossed between host and device.

    Attributes:
        uploads: Copies to the device.
        uploaded: Their bytes.
        downloads: Copies to the host.
        downloaded: Their bytes.
    """

    uploads: int = 0
    uploaded: int = 0
    downloads: int = 0
    downloaded: int = 0


@dataclass(frozen=True)
class StridedRows:
    """How a tensor [slabs, rows, columns] lies in memory, in bytes: a column is a byte here.

    Attributes:
        address: Where it begins.
        row: Distance of two rows.
        rows: Rows from one slab to the next, at least as many as are used.
    """

    address: int
    row: int
    rows: int


class Stream:
    """A CUDA stream, for one thread at a time. Everything on it runs in order; copies to and from the host are counted.

    Attributes:
        handle: Its ``cudaStream_t``.
        traffic: What has crossed so far.
    """

    def __init__(self) -> None:
        runtime = cudart()
        self._runtime = runtime
        self.handle = int(check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
        self.traffic = TransferStats()
        self._uploading: list[NDArray[Any]] = []
        self._staging = PinnedBlock(_STAGING_BYTES)
        # Its work ends first: ONNX Runtime frees memory in callbacks of the stream, where the last of it must not go.
        self._before_end: list[Callable[[], object]] = [partial(runtime.cudaStreamSynchronize, self.handle)]
        _when_gone(self, runtime.cudaStreamDestroy, self.handle)
        weakref.finalize(self, _call_all, self._before_end)  # of an object's finalizers the last made is called first

    def before_end(self, release: Callable[[], object]) -> None:
        """Has a function called before the stream is destroyed, at the latest when the process ends.

        For what a library made on this stream, which must go first: garbage collection finalizes in any order, and a
        library that finds its stream destroyed may end the process (ONNX Runtime does).

        Args:
            release: The function. It must not refer to the stream, which then would never go.
        """
        self._before_end.append(release)

    def upload(self, array: NDArray[Any], to: DeviceArray) -> None:
        """Copies an array into device memory of the same shape.

        Raises:
            TangoError: The shapes differ.
        """
        array = np.ascontiguousarray(array, to.dtype)
        _require_same(array.shape, to.shape)
        if len(self._uploading) >= MAX_UPLOADS:  # answers that fail before anything is read back leave some
            self.synchronize()
        self._copy(to.address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
        self._uploading.append(array)  # must live, and not be taken from a HostPool again, until it has been read
        self.count_upload(array.nbytes)

    def count_upload(self, size: int) -> None:
        """Counts a copy of so many bytes to the device."""
        self.traffic.uploads += 1
        self.traffic.uploaded += size

    def count_download(self, size: int) -> None:
        """Counts a copy of so many bytes to the host."""
        self.traffic.downloads += 1
        self.traffic.downloaded += size

    def download(self, memory: DeviceArray) -> NDArray[Any]:
        """A copy on the host; waits for all work before it."""
        array = np.empty(memory.shape, memory.dtype)
        small = array.nbytes <= self._staging.size
        target = self._staging.address if small else array.ctypes.data
        self._copy(target, memory.address, array.nbytes, "cudaMemcpyDeviceToHost")
        self.synchronize()
        if small:
            ctypes.memmove(array.ctypes.data, target, array.nbytes)
        self.count_download(array.nbytes)
        return array

    def copy(self, source: DeviceArray, to: DeviceArray) -> None:
        """Copies on the device, to memory of the same shape and dtype.

        Raises:
            TangoError: The shapes or dtypes differ.
        """
        _require_same((*source.shape, source.dtype), (*to.shape, to.dtype))
        self._copy(to.address, source.address, source.nbytes, "cudaMemcpyDeviceToDevice")

    def copy_strided(self, source: StridedRows, to: StridedRows, slabs: int, rows: int, width: int) -> None:
        """Copies ``slabs`` times ``rows`` rows of ``width`` bytes on the device, in one piece of work."""
        runtime = self._runtime
        job = runtime.cudaMemcpy3DParms()
        job.srcPtr = runtime.make_cudaPitchedPtr(source.address, source.row, width, source.rows)
        job.dstPtr = runtime.make_cudaPitchedPtr(to.address, to.row, width, to.rows)
        job.extent = runtime.make_cudaExtent(width, rows, slabs)
        job.kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        check(runtime.cudaMemcpy3DAsync(job, self.handle))

    def clear(self, memory: DeviceArray) -> None:
        """Sets every byte to 0."""
        check(self._runtime.cudaMemsetAsync(memory.address, 0, memory.nbytes, self.handle))

    def clear_columns(self, address: int, pitch: int, width: int, rows: int) -> None:
        """Sets the first ``width`` of every ``pitch`` bytes to 0, ``rows`` times."""
        check(self._runtime.cudaMemset2DAsync(address, pitch, 0, width, rows, self.handle))

    def synchronize(self) -> None:
        """Waits until all work is done.

        Raises:
            TangoError: Some of it failed.
        """
        check(self._runtime.cudaStreamSynchronize(self.handle))
        self.waited()

    def waited(self) -> None:
        """Says that something else has waited for all uploads."""
        self._uploading.clear()

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records the work that a function puts on this stream, without running it."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(runtime.cudaStreamBeginCapture(self.handle, mode))
        try:
            work()
        finally:  # the stream must leave its capture, whatever happened
            ended = runtime.cudaStreamEndCapture(self.handle)
        return Graph(check(ended), self)

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        kinds = self._runtime.cudaMemcpyKind
        check(self._runtime.cudaMemcpyAsync(to, source, size, getattr(kinds, kind), self.handle))


class Graph:
    """Recorded work, run anew by :meth:`launch` at the price of one launch."""

    def __init__(self, recorded: Any, stream: Stream) -> None:
        runtime = cudart()
        self._stream, self._runtime = stream, runtime
        self._executable = check(runtime.cudaGraphInstantiate(recorded, 0))
        check(runtime.cudaGraphDestroy(recorded))
        _when_gone(self, runtime.cudaGraphExecDestroy, self._executable)

    def launch(self) -> None:
        """Puts it on the stream that it was recorded from."""
        check(self._runtime.cudaGraphLaunch(self._executable, self._stream.handle))


class Event:
    """A mark in a stream, for measuring time on the device."""

    def __init__(self, stream: Stream) -> None:
        runtime = cudart()
        self._handle = check(runtime.cudaEventCreate())
        _when_gone(self, runtime.cudaEventDestroy, self._handle)
        check(runtime.cudaEventRecord(self._handle, stream.handle))

    def elapsed_ms(self, earlier: Event) -> float:
        """Milliseconds from an earlier mark to this one; waits for it."""
        runtime = cudart()
        check(runtime.cudaEventSynchronize(self._handle))
        return float(check(runtime.cudaEventElapsedTime(earlier._handle, self._handle)))


def _require_same(given: tuple[int | str, ...], wanted: tuple[int | str, ...]) -> None:
    if given != wanted:
        raise TangoError(f"a tensor is {list(given)}, wanted is {list(wanted)}", "it belongs to another bundle")


def _call_all(functions: list[Callable[[], object]]) -> None:
    for function in functions:
        function()


def _when_gone(owner: object, release: Callable[[Any], object], handle: Any) -> weakref.finalize[Any, Any]:
    """Releases what an object owns when it goes; not when the process ends, which does so in an order of its own."""
    finalizer = weakref.finalize(owner, release, handle)
    finalizer.atexit = False
    return finalizer
