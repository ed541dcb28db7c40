"""Loads the TensorRT plugins, for a build and for a run."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from tango_plugins import TangoError
from tango_runtime.system.cublaslt import preload_cublaslt


@cache
def load_plugins(trt: Any, path: Path) -> Any:
    """Registers the plugins of a library, once in a process, for as long as it lives.

    Args:
        trt: The ``tensorrt`` module.
        path: The library.

    Returns:
        TensorRT's handle of it.

    Raises:
        TangoError: TensorRT cannot load them.
    """
    fix = "build them for this TensorRT: tango plugin build (--tensorrt-include names the headers)"
    preload_cublaslt()
    registry = trt.get_plugin_registry()
    if hasattr(registry, "load_library"):  # TensorRT 8.6 on
        library = registry.load_library(str(path))
        if library is None:
            raise TangoError(f"TensorRT cannot load the plugins of {path}", fix)
        return library
    nvinfer, loaded = ctypes.CDLL("libnvinfer.so.8"), ctypes.CDLL(str(path))
    nvinfer.getPluginRegistry.restype = ctypes.c_void_p
    loaded.tango_register_plugins.argtypes, loaded.tango_register_plugins.restype = [ctypes.c_void_p], ctypes.c_bool
    if not loaded.tango_register_plugins(nvinfer.getPluginRegistry()):
        raise TangoError(f"TensorRT cannot register the plugins of {path}", fix)
    return loaded
