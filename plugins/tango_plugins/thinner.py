"""Inner pruning on the GPU: :class:`CudaThinner`, on device memory that the caller owns."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, get_args

from tango_plugins.device_array import DeviceArray
from tango_plugins.errors import TangoError
from tango_plugins.native_library import load
from tango_plugins.pruner import Dtype
from tango_plugins.structs import TangoThinShape, TangoThinTensors
from tango_plugins.thinning import Thinning


class CudaThinner:
    """Inner pruning on the GPU, for prompts of one shape.

    Args:
        thinning: The rows of the video, and how many of them stay.
        rows: N, number of rows of the prompt.
        width: D.
        dtype: Dtype of the rows.
        library: The CUDA library; None takes the one that :func:`tango_plugins.native_library.search` finds.

    Attributes:
        rows: M, number of rows that stay.
        workspace_bytes: Scratch memory to provide on the device, aligned to 256 bytes.

    Raises:
        TangoError: There is no library, or the shape is out of range.
    """

    def __init__(
        self, thinning: Thinning, rows: int, width: int, dtype: Dtype = "float16", library: Path | None = None
    ) -> None:
        self._library = load(library)
        video = thinning.begin, thinning.rows, thinning.kept
        self._shape = TangoThinShape(rows, *video, width, get_args(Dtype).index(dtype))
        size = ctypes.c_size_t()
        self._check(self._library.tango_thin_workspace(ctypes.byref(self._shape), ctypes.byref(size)))
        self.rows, self.workspace_bytes = rows - thinning.rows + thinning.kept, size.value

    def enqueue(self, prompt: Any, share: Any, *, thinned: Any, stay: Any, workspace: Any, stream: int = 0) -> None:
        """Enqueues the kernels on a stream. It neither allocates nor waits, so a CUDA graph can capture it.

        Args:
            prompt: [N, D].
            share: [N] fp32, the last row's attention to each row; only the video's rows are read.
            thinned: Output [M, D], the rows that stay.
            stay: Output [M] int32, their former indices, ascending.
            workspace: ``workspace_bytes`` of scratch memory.
            stream: A ``cudaStream_t`` as an integer.

        Raises:
            TangoError: CUDA failed.
        """
        arrays = [DeviceArray.of(array) for array in (prompt, share, thinned, stay)]
        tensors = TangoThinTensors(*(array.address for array in arrays))
        scratch = DeviceArray.of(workspace, "workspace")
        call = ctypes.byref(self._shape), ctypes.byref(tensors), scratch.address, scratch.nbytes, stream
        self._check(self._library.tango_thin_enqueue(*call))

    def _check(self, status: int) -> None:
        if status != 0:
            message = self._library.tango_last_error().decode()
            raise TangoError(f"the CUDA library rejected the call: {message}", "see: tango doctor")
