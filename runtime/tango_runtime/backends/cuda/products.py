"""The first product of fp16 matrices in a process, in which cuBLASLt starts and loads its kernel."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

from tango_plugins import TangoError, native_library
from tango_plugins.structs import TangoFp16LinearTensors, TangoLinearShape
from tango_runtime.backends.cuda.device import Buffer, Stream

_log = logging.getLogger(__name__)

#: Rows and widths of the product: enough that cuBLASLt takes a kernel as for a video's tokens.
_SIZE = 1024


def start_products(path: Path) -> None:
    """Runs a product, so that no answer waits for the first one. Any thread may call this.

    A failure is left to the product that needs what failed: not every engine has one.

    Args:
        path: The library that will multiply: each has a cuBLASLt context of its own.
    """
    try:
        library, stream, size = native_library.load(path), Stream(), 2 * _SIZE * _SIZE
        memory = Buffer(3 * size)
        x, weight, y = (memory.address + i * size for i in range(3))
        shape, tensors = TangoLinearShape(_SIZE, _SIZE, _SIZE), TangoFp16LinearTensors(x, weight, x, y)
        for function in (library.tango_fp16_linear_enqueue, library.tango_fp16_linear_gelu_enqueue):
            if function(ctypes.byref(shape), ctypes.byref(tensors), stream.handle) != 0:
                raise TangoError(library.tango_last_error().decode(), "see: tango doctor")
        stream.synchronize()
    except TangoError as error:
        _log.debug("no product was run in advance: %s", error.message)
