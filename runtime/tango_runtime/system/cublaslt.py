"""cuBLASLt, by which the CUDA library multiplies matrices of device graphs. It loads it by name when it first does."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tango_plugins import TangoError, native_library

#: The names that the CUDA library tries (native/src/linear/cublaslt.cu), the newest first.
NAMES = tuple(f"libcublasLt.so.{version}" for version in (13, 12, 11))

_FIX = "install CUDA's cuBLAS, or for CUDA 13: pip install nvidia-cublas; for CUDA 12: pip install nvidia-cublas-cu12"


def preload_cublaslt() -> None:
    """Loads it where only a Python package has it: the CUDA library takes the one that the process has."""
    for name in (*NAMES, *_packaged()):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return


def cublaslt_version(library: Path) -> int:
    """The major version of cuBLASLt.

    Args:
        library: The CUDA library.

    Raises:
        TangoError: There is none that it can load.
    """
    preload_cublaslt()
    found, version = native_library.load(library), ctypes.c_int32()
    if found.tango_cublaslt_version(ctypes.byref(version)) != 0:
        raise TangoError(found.tango_last_error().decode(), _FIX)
    return version.value


def _packaged() -> Iterator[str]:
    """The files of the packages nvidia-cublas and nvidia-cublas-cu12, which the dynamic linker does not search."""
    spec = find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for name in NAMES:
        for folder in folders:
            yield from map(str, Path(folder).glob(f"*/lib/{name}"))
