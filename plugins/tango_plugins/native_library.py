"""The CUDA library: where it is searched, whether it fits this machine, and how it is loaded (ctypes)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tango_plugins import driver, structs
from tango_plugins.errors import TangoError

#: The version of the C interface that this package uses: TANGO_ABI_VERSION of tango/common.h.
ABI_VERSION = 12

NATIVE = Path(__file__).parent / "native"
LIBRARY = "libtango.so"

#: The folder of the library that a platform wheel contains. A checkout and the pure Python wheel do not have it.
PREBUILT = Path(__file__).parent / "prebuilt"

#: Environment variable with the path of the CUDA library, for containers and packages that install it elsewhere.
VARIABLE = "TANGO_LIBRARY"

#: GPU code as named in a library's version; the machine numbers of ELF files.
_CODE = r"\b(sm|compute)_(\d+)([af]?)\b"
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}

_SIZE = POINTER(c_size_t)
_PRUNE = (POINTER(structs.TangoPruneShape), POINTER(structs.TangoPruneParams))
_SCRATCH = (c_void_p, c_size_t, c_void_p)  # workspace, its size, stream
_PRUNE_TENSORS = (POINTER(structs.TangoPruneTensors), *_SCRATCH)
_DECODE = POINTER(structs.TangoDecodeShape)
_RESIZE = POINTER(structs.TangoResizeShape)
_THIN = POINTER(structs.TangoThinShape)
_ROWS = (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p)
_RESULT = (c_int32, c_float, c_void_p, c_void_p)  # its type and scale, its address, stream
_FP16_LINEAR = (POINTER(structs.TangoLinearShape), POINTER(structs.TangoFp16LinearTensors), c_void_p)
_FP8_LINEAR = (POINTER(structs.TangoLinearShape), POINTER(structs.TangoFp8LinearTensors), c_float, c_void_p)
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
    "tango_decode_next": (
        *(_DECODE, POINTER(structs.TangoDecodeTensors), c_int32, c_int32, POINTER(structs.TangoDecodeWords)),
        *(c_void_p, POINTER(c_int32), *_SCRATCH),
    ),
    "tango_decode_batch_workspace": (_DECODE, _SIZE),
    "tango_decode_batch_enqueue": (
        *(_DECODE, POINTER(structs.TangoDecodeTensors), POINTER(structs.TangoDecodeSequence)),
        *(c_int32, *_SCRATCH),
    ),
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
    "tango_patches_enqueue": (
        POINTER(structs.TangoPatchesShape),
        POINTER(structs.TangoPatchesTensors),
        c_void_p,
    ),
    "tango_vision_attention_enqueue": (
        POINTER(structs.TangoVisionAttentionShape),
        POINTER(structs.TangoVisionAttentionTensors),
        c_void_p,
    ),
    "tango_interleave_enqueue": (POINTER(structs.TangoMatrix), c_int32, c_int32, *_SCRATCH),
    "tango_linear_workspace": (POINTER(structs.TangoLinearShape), _SIZE),
    "tango_linear_enqueue": (
        *(POINTER(structs.TangoLinearShape), POINTER(structs.TangoMatrix)),
        *(c_void_p, c_void_p, *_SCRATCH),
    ),
    "tango_fp16_linear_enqueue": _FP16_LINEAR,
    "tango_fp16_linear_gelu_enqueue": _FP16_LINEAR,
    "tango_cublaslt_version": (POINTER(c_int32),),
    "tango_int8_linear_enqueue": (
        POINTER(structs.TangoLinearShape),
        POINTER(structs.TangoMatrix),
        *(c_void_p, c_float, c_void_p, c_void_p),
    ),
    "tango_resize_workspace": (_RESIZE, _SIZE),
    "tango_resize_enqueue": (_RESIZE, POINTER(structs.TangoResizeTensors), *_SCRATCH),
    "tango_layer_norm_enqueue": _NORM,
    "tango_rms_norm_enqueue": _NORM,
    "tango_bias_enqueue": (c_int32, *_ROWS),
    "tango_bias_gelu_enqueue": (c_int32, c_int32, *(c_void_p,) * 2, c_int64, c_int64, *_RESULT),
    "tango_swiglu_enqueue": (c_int32, c_void_p, c_void_p, c_int64, *_RESULT),
    "tango_bias_swiglu_enqueue": (c_int32, *(c_void_p,) * 4, c_int64, c_int64, c_float, *_RESULT),
    "tango_quantize_enqueue": (c_int32, c_void_p, c_int64, *_RESULT),
    "tango_fp8_linear_enqueue": _FP8_LINEAR,
    "tango_fp8_linear_gelu_enqueue": _FP8_LINEAR,
    "tango_rows_gather_enqueue": (c_void_p, c_void_p, c_void_p, c_int32, c_int64, c_void_p, c_void_p),
    "tango_thin_workspace": (_THIN, _SIZE),
    "tango_thin_enqueue": (_THIN, POINTER(structs.TangoThinTensors), *_SCRATCH),
    "tango_argmax_enqueue": (c_void_p, c_int32, c_void_p, c_void_p),
    "tango_argmax_rows_enqueue": (POINTER(c_void_p), c_int32, c_int32, c_void_p, c_void_p),
}


def install_directory() -> Path:
    """The folder that ``tango plugin build`` installs to.

    Its name contains a digest of the sources, so that a library built from other sources is never loaded by mistake.
    """
    data = Path(os.environ.get("XDG_DATA_HOME") or "")
    if not data.is_absolute():  # also if the variable is not set
        data = Path.home() / ".local" / "share"
    return data / "tango-edge" / f"native-{_digest()}"


@dataclass(frozen=True)
class Candidate:
    """A place where the CUDA library is searched.

    Attributes:
        origin: What the place is, as printed by ``tango plugin info``.
        path: The library there, whether or not it exists.
        error: Why it cannot be used on this machine, None if it can.
        code: The code that this machine's GPU runs, such as ``sm_87``; None if there is no GPU.
    """

    origin: str
    path: Path
    error: TangoError | None = None
    code: str | None = None


def search() -> list[Candidate]:
    """Looks for a CUDA library that fits this machine, and stops at the first.

    ``TANGO_LIBRARY`` is the only place if it is set. Otherwise a library that ``tango plugin build`` installed comes
    before the prebuilt one of a wheel: whoever built one wanted it, and the TensorRT plugins are beside it.

    Returns:
        The places that were looked at, in order; at least one. Only the last can be without an error.
    """
    named = os.environ.get(VARIABLE)
    places = [("built on this machine", install_directory() / LIBRARY), ("prebuilt", PREBUILT / LIBRARY)]
    found: list[Candidate] = []
    for origin, path in [(f"named by {VARIABLE}", Path(named))] if named else places:
        try:
            found.append(Candidate(origin, path, code=_check_fit(path)))
            break
        except TangoError as error:
            found.append(Candidate(origin, path, error))
    return found


def installed() -> Path:
    """The CUDA library in use. If none is usable, the first place of the search, whether or not it exists."""
    found = search()
    return found[-1].path if found[-1].error is None else found[0].path


def load(path: Path | None = None) -> ctypes.CDLL:
    """Loads the CUDA library, once per path.

    Args:
        path: The library, for any GPU; None takes the one that :func:`search` finds.

    Raises:
        TangoError: It does not exist, cannot be loaded, has another C interface, or does not fit this machine.
    """
    if path is not None:
        return _load(path)
    found = search()
    if found[-1].error is None:
        return _load(found[-1].path)
    failed = sorted(found, key=lambda place: not place.path.is_file())  # why a library does not fit comes first
    raise next(place.error for place in failed if place.error is not None)


def code_for(version: str, capability: str) -> str | None:
    """The code in a library that a GPU runs, such as ``sm_87``; None if it has none.

    Machine code runs on GPUs of the same major compute capability and the same or a later minor one; code for
    ``sm_90a`` on 9.0 alone. PTX runs on every later GPU, once its driver has compiled it.

    Args:
        version: What the library's ``tango_version`` returns.
        capability: The GPU's compute capability, as ``9.0``.
    """
    own = _release(capability)
    served = []
    for kind, number, suffix in re.findall(_CODE, version):
        least = divmod(int(number), 10)
        if least == own or (not suffix and least < own and (kind == "compute" or least[0] == own[0])):
            served.append((kind == "sm", least, f"{kind}_{number}{suffix}"))
    return max(served)[-1] if served else None  # machine code before PTX, then the closest


def _check_fit(path: Path) -> str | None:
    """The code of a library that this machine's GPU runs, None without a GPU; raises if it does not fit the machine."""
    version = _load(path).tango_version().decode()
    gpu = _gpu()
    if gpu is None or "sm_" not in version:  # nothing to compare; the tests' emulator has no architectures
        return None
    hint = "build one for this machine: tango plugin build"
    built_with = re.search(r"CUDA ([\d.]+)", version)
    cuda = built_with[1] if built_with else gpu.cuda
    supported = f"the driver supports CUDA up to {gpu.cuda}"
    if _release(cuda)[0] > _release(gpu.cuda)[0]:  # a CUDA runtime needs a driver of its major version
        raise TangoError(f"the CUDA library {path} needs CUDA {cuda}; {supported}", f"{hint}; or update the driver")
    code = code_for(version, gpu.compute_capability)
    who = f"this GPU ({gpu.name}, compute capability {gpu.compute_capability})"
    if code is None:
        raise TangoError(f"the CUDA library {path} has no code for {who}: it is {version}", hint)
    if code.startswith("compute_") and _release(cuda) > _release(gpu.cuda):  # drivers compile no later CUDA's PTX
        text = f"the CUDA library {path} has only PTX of CUDA {cuda} for {who}; {supported}"
        raise TangoError(text, f"{hint}; or update the driver")
    return code


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@cache
def _gpu() -> driver.Gpu | None:
    try:
        return driver.gpu()
    except TangoError:  # functions that need no GPU can still be called
        return None


@cache
def _load(path: Path) -> ctypes.CDLL:
    build = "build it: tango plugin build"
    if not path.is_file():
        hint = f"correct or unset {VARIABLE}" if str(path) == os.environ.get(VARIABLE) else build
        raise TangoError(f"the CUDA library {path} does not exist", hint)
    with path.open("rb") as file:
        machine = _ELF_MACHINES.get(int.from_bytes(file.read(20)[18:], "little"))
    if machine not in (None, platform.machine()):  # the dynamic linker would say that the file does not exist
        raise TangoError(f"the CUDA library {path} is for {machine}; this machine is {platform.machine()}", build)
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
