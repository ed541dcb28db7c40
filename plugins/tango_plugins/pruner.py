"""The operator on the GPU: :class:`CudaPruner`, on device memory that the caller owns.

It needs neither torch nor TensorRT: it takes any array with ``__cuda_array_interface__`` or ``__dlpack__``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Literal, cast, get_args

from tango_plugins import op
from tango_plugins.device_array import DeviceArray
from tango_plugins.errors import TangoError
from tango_plugins.native_library import load
from tango_plugins.op import Precision
from tango_plugins.params import Budget, MergeOrder, PruneParams
from tango_plugins.structs import TangoPruneParams, TangoPruneShape, TangoPruneTensors

Dtype = Literal["float16", "float32"]

#: TANGO_STEPS of tango/steps.h.
_STEPS = 10


class CudaPruner:
    """The operator on the GPU, for videos of one shape.

    Args:
        params: Parameters of the operator; the grid gives L.
        frames: F, at most 256.
        width: D, even.
        dtype: Dtype of the features and tokens.
        precision: ``fast`` rounds rotated features to fp16 for inner products, ``exact`` keeps squared distances to
            1e-6.
        library: The CUDA library; None takes the one that :func:`tango_plugins.native_library.search` finds.

    Attributes:
        capacity: Rows of ``tokens``, ``indices`` and ``merged``.
        workspace_bytes: Scratch memory to provide on the device, aligned to 256 bytes.

    Raises:
        TangoError: There is no library, or it does not support the shape or a parameter.
    """

    def __init__(
        self,
        params: PruneParams,
        frames: int,
        width: int,
        dtype: Dtype = "float16",
        precision: Precision = "fast",
        library: Path | None = None,
    ) -> None:
        if dtype not in get_args(Dtype):
            raise TangoError(f"dtype is {dtype!r}", f"it must be one of {', '.join(get_args(Dtype))}")
        if precision not in get_args(Precision):
            raise TangoError(f"precision is {precision!r}", f"it must be one of {', '.join(get_args(Precision))}")
        self._library = load(library)
        self._tokens_per_frame = params.grid[0] * params.grid[1]
        self._frames, self._width, self._dtype = frames, width, dtype
        self._sinks = (ctypes.c_int32 * len(params.sinks))(*params.sinks)
        self._params = _c_params(params, precision, self._sinks)
        self._shape = TangoPruneShape(frames, self._tokens_per_frame, width, get_args(Dtype).index(dtype))
        capacity, size = ctypes.c_int32(), ctypes.c_size_t()
        self._check(self._library.tango_prune_capacity(*self._call, ctypes.byref(capacity)))
        self._check(self._library.tango_prune_workspace(*self._call, ctypes.byref(size)))
        self.capacity, self.workspace_bytes = capacity.value, size.value

    def enqueue(
        self,
        features: Any,
        salience: Any,
        timestamps: Any,
        *,
        tokens: Any,
        indices: Any,
        count: Any,
        workspace: Any,
        merged: Any = None,
        segments: Any = None,
        stream: int = 0,
        steps: tuple[int, int] = (0, _STEPS - 1),
    ) -> None:
        """Enqueues the operator on a stream. It neither allocates nor waits, so a CUDA graph can capture it.

        All arrays are contiguous device memory, features and tokens aligned to 16 bytes. They must stay allocated until
        the stream has finished.

        Args:
            features: X [F, L, D].
            salience: A [F, L] fp32.
            timestamps: t [F] fp32, seconds.
            tokens: Output [capacity, D], zero past the count.
            indices: Output [capacity] int32, ascending, −1 past the count.
            count: Output [1] int32.
            workspace: ``workspace_bytes`` of scratch memory.
            merged: Output [capacity] uint8 or None: 1 for context tokens.
            segments: Output [F, 2] int32 or None: first frame and one past the last; −1 past the last segment.
            stream: A ``cudaStream_t`` as an integer.
            steps: First and last step of tango/steps.h, for tests.

        Raises:
            TangoError: An array has the wrong shape or dtype, is not on the device, or CUDA failed.
        """
        F, L, D, K = self._frames, self._tokens_per_frame, self._width, self.capacity
        tensors = TangoPruneTensors(
            _pointer(features, "features", (F, L, D), self._dtype),
            _pointer(salience, "salience", (F, L), "float32"),
            _pointer(timestamps, "timestamps", (F,), "float32"),
            _pointer(tokens, "tokens", (K, D), self._dtype),
            _pointer(indices, "indices", (K,), "int32"),
            _pointer(count, "count", (1,), "int32"),
            None if merged is None else _pointer(merged, "merged", (K,), "uint8"),
            None if segments is None else _pointer(segments, "segments", (F, 2), "int32"),
        )
        scratch = DeviceArray.of(workspace, "workspace")
        status = self._library.tango_prune_enqueue_steps(
            *self._call, ctypes.byref(tensors), scratch.address, scratch.nbytes, stream, *steps
        )
        self._check(status)

    def region(self, name: str) -> slice:
        """The bytes of an intermediate result in the workspace, by its name in native/src/prune/job.cuh; for tests."""
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        where = (name.encode(), ctypes.byref(offset), ctypes.byref(size))
        self._check(self._library.tango_prune_region(*self._call, *where))
        return slice(offset.value, offset.value + size.value)

    @property
    def _call(self) -> tuple[Any, Any]:
        return ctypes.byref(self._shape), ctypes.byref(self._params)

    def _check(self, status: int) -> None:
        if status != 0:
            message = self._library.tango_last_error().decode()
            raise TangoError(f"the CUDA library rejected the call: {message}", "see docs/reference/limits.md")


def _c_params(params: PruneParams, precision: Precision, sinks: ctypes.Array[ctypes.c_int32]) -> TangoPruneParams:
    found = cast("dict[str, Any]", op.attributes(params.resolved()))
    numbers = {name: value for name, value in found.items() if isinstance(value, int)}
    return TangoPruneParams(
        **numbers,
        grid_rows=params.grid[0],
        grid_columns=params.grid[1],
        merge_order=get_args(MergeOrder).index(params.merge_order),
        budget=get_args(Budget).index(params.budget),
        precision=get_args(Precision).index(precision),
        sink_count=len(sinks),
        sink_positions=ctypes.cast(sinks, ctypes.POINTER(ctypes.c_int32)),
    )


def _pointer(array: Any, name: str, shape: tuple[int, ...], dtype: str) -> int:
    memory = DeviceArray.of(array, name)
    if memory.shape != shape or memory.dtype != dtype:
        found = f"{name} is {memory.dtype} {list(memory.shape)}"
        raise TangoError(found, f"this pruner takes {dtype} {list(shape)}")
    return memory.address
