"""Frames on a GPU → input of a vision graph, by the CUDA library: colors, rotation, bicubic resize (tango/frames.h)."""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path

from tango_plugins.device_array import DeviceArray
from tango_plugins.errors import TangoError
from tango_plugins.native_library import load
from tango_plugins.structs import TangoResizeShape, TangoResizeTensors

#: Major version of Pillow, whose results the kernels reproduce.
_PILLOW = int(version("pillow").split(".")[0])

#: TangoPixelFormat of tango/frames.h.
RGB24, NV12, P010 = 0, 1, 2


def columns_first(shown: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether the installed Pillow resizes columns before rows, which decides how values are rounded in between.

    Args:
        shown: (height, width) of the frame as it is shown.
        size: (height, width) of the result.
    """
    shrinks = shown[0] - size[0]
    return _PILLOW >= 13 and shrinks > max(0, 2 * (shown[1] - size[1]))


def workspace_bytes(shape: TangoResizeShape, library: Path | None = None) -> int:
    """Bytes of device memory that :func:`enqueue` needs in addition to the frames.

    Raises:
        TangoError: There is no CUDA library, or the shape is out of its range.
    """
    size, loaded = ctypes.c_size_t(), load(library)
    _check(loaded, loaded.tango_resize_workspace(shape, ctypes.byref(size)))
    return size.value


def enqueue(
    shape: TangoResizeShape,
    image: int,
    chroma: int | None,
    resized: DeviceArray,
    workspace: DeviceArray,
    stream: int,
    library: Path | None = None,
) -> None:
    """Resizes frames on the device.

    Args:
        shape: Shape of the stored frames, how they are shown, and the size of the result.
        image: Address of the first frame's RGB or luma.
        chroma: Address of its chroma, None for RGB.
        resized: uint8 RGB [F, out_rows, out_columns, 3], written.
        workspace: :func:`workspace_bytes`, at a multiple of 256 bytes.
        stream: A ``cudaStream_t``.
        library: The CUDA library; None takes the one that :func:`tango_plugins.native_library.search` finds.

    Raises:
        TangoError: There is no CUDA library, it rejects an argument, or CUDA failed.
    """
    wanted = (shape.frames, shape.out_rows, shape.out_columns, 3)
    if (resized.shape, resized.dtype) != (wanted, "uint8"):
        raise TangoError(f"resized is {resized.dtype} {list(resized.shape)}", f"it must be uint8 {list(wanted)}")
    loaded, tensors = load(library), TangoResizeTensors(image, chroma, resized.address)
    scratch = (workspace.address, workspace.nbytes, stream)
    _check(loaded, loaded.tango_resize_enqueue(shape, tensors, *scratch))


def _check(library: ctypes.CDLL, status: int) -> None:
    if status != 0:
        message = library.tango_last_error().decode()
        raise TangoError(f"the CUDA library cannot resize frames: {message}", "see: tango doctor")
