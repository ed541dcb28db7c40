"""This machine's GPU and memory, and the TensorRT plugin."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tango_plugins import TangoError
from tango_plugins.build import TENSORRT_LIBRARY
from tango_plugins.driver import Gpu, driver, gpu
from tango_plugins.native_library import installed
from tango_runtime.util.versions import release

__all__ = ["Free", "Gpu", "Plugin", "available_host", "free", "gpu", "plugin"]


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
    """

    path: Path
    interface: str
    api: Literal["V2", "V3"]

    def serves(self, tensorrt: str) -> bool:
        """Whether that version of TensorRT can load it."""
        return (self.api == "V3") == (release(tensorrt) >= (10,))


def free(found: Gpu) -> Free:
    """Free memory of the first GPU and of the host. It opens a CUDA context briefly.

    Raises:
        TangoError: The driver reports an error.
    """
    host = available_host()
    if found.integrated:
        return Free(host, host, shared=True)
    call = driver()
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
        return Plugin(path, str(library.tango_abi_version()), "V3" if hasattr(library, "getCreators") else "V2")
    except (OSError, AttributeError) as error:
        raise TangoError(f"the TensorRT plugin {path} cannot be loaded: {error}", "tango plugin build") from error
