"""The NVIDIA driver and the first GPU.

The driver's library is called through ctypes, so that finding out what is missing needs nothing installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tango_plugins.errors import TangoError

_DRIVER = "libcuda.so.1"
# CUdevice_attribute of cuda.h
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76


@dataclass(frozen=True)
class Gpu:
    """The first GPU that CUDA sees.

    Attributes:
        name: Its name, as the driver reports it.
        compute_capability: Such as ``9.0``.
        cuda: The newest CUDA that its driver supports, such as ``12.4``.
        memory: Its memory in bytes.
        integrated: Whether it shares the host's memory, as on a Jetson.
    """

    name: str
    compute_capability: str
    cuda: str
    memory: int
    integrated: bool


def gpu() -> Gpu:
    """The first GPU that CUDA sees.

    Raises:
        TangoError: There is no driver or no GPU.
    """
    call = driver()
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


def driver() -> Callable[..., None]:
    """``call(function, *arguments)`` of the initialized driver.

    Raises:
        TangoError: There is no driver; ``call`` raises one where a function of the driver fails.
    """
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
