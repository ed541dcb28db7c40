"""The CUDA library: where it is installed, and how it is loaded (ctypes)."""

from __future__ import annotations

import ctypes
import hashlib
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from tango_plugins import structs
from tango_plugins.errors import TangoError

#: The version of the C interface that this package uses: TANGO_ABI_VERSION of tango/common.h.
ABI_VERSION = 4

NATIVE = Path(__file__).parent / "native"
LIBRARY = "libtango.so"

#: Environment variable with the path of the CUDA library, for containers and packages that install it elsewhere.
VARIABLE = "TANGO_LIBRARY"

_SIZE = POINTER(c_size_t)
_PRUNE = (POINTER(structs.TangoPruneShape), POINTER(structs.TangoPruneParams))
_SCRATCH = (c_void_p, c_size_t, c_void_p)  # workspace, its size, stream
_PRUNE_TENSORS = (POINTER(structs.TangoPruneTensors), *_SCRATCH)
_DECODE = POINTER(structs.TangoDecodeShape)
_RESIZE = POINTER(structs.TangoResizeShape)
_THIN = POINTER(structs.TangoThinShape)
_ROWS = (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p)
_NORM = (POINTER(structs.TangoNormShape), POINTER(structs.TangoNormTensors), c_void_p)

#: Argument types of every function that returns a TangoStatus.
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "tango_prune_capacity": (*_PRUNE, POINTER(c_int32)),
    "tango_prune_workspace": (*_PRUNE, _SIZE),
    "tango_prune_enqueue": (*_PRUNE, *_PRUNE_TENSORS),
    "tango_prune_enqueue_steps": (*_PRUNE, *_PRUNE_TENSORS, c_int32, c_int32),
    "tango_prune_region": (*_PRUNE, c_char_p, _SIZE, _SIZE),
    "tango_decode_workspace": (_DECODE, _SIZE),
    "tango_decode_enqueue": (_DECODE, POINTER(structs.TangoDecodeTensors), *(c_int32, c_int32), *_SCRATCH),
    "tango_attention_enqueue": (
        POINTER(structs.TangoAttentionShape),
        POINTER(structs.TangoAttentionTensors),
        c_void_p,
    ),
    "tango_attention_shares_enqueue": (
        POINTER(structs.TangoAttentionShape),
        POINTER(structs.TangoAttentionTensors),
        c_void_p,
        c_void_p,
    ),
    "tango_patch_rotation_enqueue": (
        POINTER(structs.TangoPatchRotationShape),
        POINTER(structs.TangoPatchRotationTensors),
        c_void_p,
    ),
    "tango_vision_attention_enqueue": (
        POINTER(structs.TangoVisionAttentionShape),
        POINTER(structs.TangoVisionAttentionTensors),
        c_void_p,
    ),
    "tango_linear_enqueue": (
        POINTER(structs.TangoLinearShape),
        POINTER(structs.TangoMatrix),
        *(c_void_p, c_void_p, c_void_p),
    ),
    "tango_resize_workspace": (_RESIZE, _SIZE),
    "tango_resize_enqueue": (_RESIZE, POINTER(structs.TangoResizeTensors), *_SCRATCH),
    "tango_layer_norm_enqueue": _NORM,
    "tango_rms_norm_enqueue": _NORM,
    "tango_bias_enqueue": (c_int32, *_ROWS),
    "tango_bias_gelu_enqueue": (c_int32, c_int32, *_ROWS),
    "tango_swiglu_enqueue": (c_int32, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    "tango_bias_swiglu_enqueue": (c_int32, *(c_void_p,) * 4, c_int64, c_int64, c_float, c_void_p, c_void_p),
    "tango_rows_gather_enqueue": (c_void_p, c_void_p, c_void_p, c_int32, c_int64, c_void_p, c_void_p),
    "tango_thin_workspace": (_THIN, _SIZE),
    "tango_thin_enqueue": (_THIN, POINTER(structs.TangoThinTensors), *_SCRATCH),
    "tango_argmax_enqueue": (c_void_p, c_int32, c_void_p, c_void_p),
}


def install_directory() -> Path:
    """The folder that ``tango plugin build`` installs to.

    Its name contains a digest of the sources, so that a library built from other sources is never loaded by mistake.
    """
    data = Path(os.environ.get("XDG_DATA_HOME") or "")
    if not data.is_absolute():  # also if the variable is not set
        data = Path.home() / ".local" / "share"
    return data / "tango-edge" / f"native-{_digest()}"


def installed() -> Path:
    """The CUDA library in use, whether or not it exists: ``TANGO_LIBRARY``, or what ``tango plugin build`` installs."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else install_directory() / LIBRARY


def load(path: Path | None = None) -> ctypes.CDLL:
    """Loads the CUDA library, once per path.

    Args:
        path: The library; None takes :func:`installed`.

    Raises:
        TangoError: It does not exist, cannot be loaded, or has another C interface.
    """
    return _load(path if path is not None else installed())


@cache
def _load(path: Path) -> ctypes.CDLL:
    build = "build it: tango plugin build"
    if not path.is_file():
        hint = f"correct or unset {VARIABLE}" if str(path) == os.environ.get(VARIABLE) else build
        raise TangoError(f"the CUDA library {path} does not exist", hint)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise TangoError(f"the CUDA library {path} cannot be loaded: {error}", build) from error
    if not hasattr(library, "tango_abi_version"):
        raise TangoError(f"{path} is not the CUDA library of tango-edge", f"{VARIABLE} must name {LIBRARY}")
    _check_interface(library, path)
    for name in ("tango_last_error", "tango_version"):
        getattr(library, name).restype = c_char_p
    for name, arguments in _ARGUMENTS.items():
        if hasattr(library, name):  # the libraries of tests/plugins/cuda_emulator have some of them
            getattr(library, name).argtypes = arguments
    return library


def _check_interface(library: ctypes.CDLL, path: Path) -> None:
    hint = "rebuild it: tango plugin build"
    found = library.tango_abi_version()
    if found != ABI_VERSION:
        raise TangoError(f"the CUDA library {path} has interface version {found}, not {ABI_VERSION}", hint)
    library.tango_sizeof.restype, library.tango_sizeof.argtypes = c_size_t, (c_char_p,)
    for struct in structs.STRUCTS:
        size, wanted = library.tango_sizeof(struct.__name__.encode()), ctypes.sizeof(struct)
        if size != wanted:
            raise TangoError(f"{struct.__name__} has {size} bytes in the CUDA library {path}, not {wanted}", hint)


@cache
def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in NATIVE.rglob("*") if path.is_file()):
        digest.update(path.relative_to(NATIVE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
