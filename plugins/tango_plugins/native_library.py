"""The CUDA library: where it is installed, and how it is loaded (ctypes)."""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path

from tango_plugins.errors import TangoError

#: The C interface that this module speaks: TANGO_PRUNE_INTERFACE of tango/prune.h.
INTERFACE = 1

NATIVE = Path(__file__).parent / "native"
LIBRARY = "libtango_prune.so"


def install_directory() -> Path:
    """Where ``tango plugin build`` puts the libraries made of these sources, and where they are looked for.

    The name holds a digest of the sources: a library of other sources is never loaded by mistake.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in NATIVE.rglob("*") if path.is_file()):
        digest.update(path.relative_to(NATIVE).as_posix().encode() + b"\0" + path.read_bytes())
    return Path.home() / ".local" / "share" / "tango-edge" / f"native-{digest.hexdigest()[:16]}"


def installed() -> Path:
    """The CUDA library that ``tango plugin build`` installs for these sources, whether or not it is there."""
    return install_directory() / LIBRARY


@cache
def load(path: Path | None = None) -> ctypes.CDLL:
    """Loads the CUDA library.

    Args:
        path: The library; None takes the one that ``tango plugin build`` installed.

    Raises:
        TangoError: There is none, it cannot be loaded, or it speaks another interface.
    """
    found = path if path is not None else installed()
    if not found.is_file():
        raise TangoError(f"the CUDA library {found} does not exist", "build it: tango plugin build")
    try:
        library = ctypes.CDLL(str(found))
    except OSError as error:
        raise TangoError(f"the CUDA library {found} cannot be loaded: {error}", "tango plugin build") from error
    interface = library.tango_prune_interface()
    if interface != INTERFACE:
        hint = "rebuild it: tango plugin build"
        raise TangoError(f"the CUDA library {found} has interface {interface}, and this is {INTERFACE}", hint)
    library.tango_last_error.restype = ctypes.c_char_p
    library.tango_version.restype = ctypes.c_char_p
    size = ctypes.c_size_t
    library.tango_prune_enqueue_steps.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, size, ctypes.c_void_p),
        *(ctypes.c_int32, ctypes.c_int32),
    ]
    return library
