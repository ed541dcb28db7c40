"""This machine's GPU and memory, and the TensorRT plugin.

The driver's library is called through ctypes, so that finding out what is missing needs nothing installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tango_plugins import TangoError
from tango_plugins.build import TENSORRT_LIBRARY
from tango_plugins.native_library import installed
from tango_runtime.util.versions import release

_DRIVER = "libcuda.so.1"
# CUdevice_attribute of cuda.h
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76


@dataclass(frozen=True)
class Gpu:
    """The first GPU that CUDA sees.

    Attributes:
        name: The driver's name of it.
        compute_capability: As ``9.0``.
        cuda: The newest CUDA that its driver supports, as ``12.4``.
        memory: Its memory in bytes.
        integrated: Its memory is the host's, as on a Jetson.
    """

    name: str
    compute_capability: str
    cuda: str
    memory: int
    integrated: bool


@dataclass(frozen=True)
class Free:
    """Free memory in bytes.

    Attributes:
        device: The GPU's.
        host: The host's.
        shared: Both are the same memory, as on a Jetson.
    """

    device: int
    host: int
    shared: bool = False


@dataclass(frozen=True)
class Plugin:
    """The TensorRT plugin on disk.

    Attributes:
        path: The library file.
        interface: Version of its interface.
        api: ``V2`` for TensorRT 8 and 9, ``V3`` for 10 and later.
        built_for: Its version and the GPU architectures that it contains.
    """

    path: Path
    interface: str
    api: Literal["V2", "V3"]
    built_for: str

    def serves(self, tensorrt: str) -> bool:
        """Whether that version of TensorRT can load it."""
        return (self.api == "V3") == (release(tensorrt) >= (10,))


def gpu() -> Gpu:
    """The first GPU that CUDA sees.

    Raises:
        TangoError: There is no driver or no GPU.
    """
    call = _driver()
    device, count, number, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    call("cuDeviceGetCount", ctypes.byref(count))
    if count.value == 0:
        raise TangoError("CUDA sees no GPU", "check CUDA_VISIBLE_DEVICES and nvidia-smi")
    call("cuDeviceGet", ctypes.byref(device), 0)
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, len(name), device)
    call("cuDriverGetVersion", ctypes.byref(number))
    call("cuDeviceTotalMem_v2", ctypes.byref(total), device)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    return Gpu(
        name=name.value.decode(),
        compute_capability=f"{attribute(_MAJOR)}.{attribute(_MINOR)}",
        cuda=f"{number.value // 1000}.{number.value % 1000 // 10}",
        memory=total.value,
        integrated=bool(attribute(_INTEGRATED)),
    )


def free(found: Gpu) -> Free:
    """Free memory of the first GPU and of the host. It opens a CUDA context briefly.

    Raises:
        TangoError: The driver reports an error.
    """
    host = available_host()
    if found.integrated:
        return Free(host, host, shared=True)
    call = _driver()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    left, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        call("cuCtxPushCurrent_v2", context)
        call("cuMemGetInfo_v2", ctypes.byref(left), ctypes.byref(total))
        call("cuCtxPopCurrent_v2", ctypes.byref(context))
    finally:
        call("cuDevicePrimaryCtxRelease_v2", device)
    return Free(left.value, host)


def available_host(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of host memory available without swapping (the kernel's MemAvailable)."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise TangoError(f"{meminfo} has no MemAvailable", "use Linux 3.14 or later")


def plugin(folder: Path | None = None) -> Plugin | None:
    """The TensorRT plugin that ``tango plugin build`` installed, None if there is none.

    Args:
        folder: Where to look; None takes the folder where it is installed.

    Raises:
        TangoError: It cannot be loaded.
    """
    path = (folder or installed().parent) / TENSORRT_LIBRARY
    if not path.is_file():
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.tango_version.restype = ctypes.c_char_p
        version = library.tango_version().decode()
        return Plugin(
            path, str(library.tango_abi_version()), "V3" if hasattr(library, "getCreators") else "V2", version
        )
    except (OSError, AttributeError) as error:
        raise TangoError(f"the TensorRT plugin {path} cannot be loaded: {error}", "tango plugin build") from error


def _driver() -> Callable[..., None]:
    """``call(function, *arguments)`` of the initialized driver."""
    try:
        library = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise TangoError(
            f"there is no NVIDIA driver: {_DRIVER} cannot be loaded",
            "on a machine with an NVIDIA GPU, install its driver; start a container with --gpus all",
        ) from error

    def call(function: str, *arguments: Any) -> None:
        status = getattr(library, function)(*arguments)
        if status != 0:
            raise TangoError(f"the NVIDIA driver failed: {function}: {_meaning(library, status)}", "see: nvidia-smi")

    call("cuInit", 0)
    return call


def _meaning(library: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    return text.value.decode() if text.value else str(status)
