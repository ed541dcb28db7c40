"""Device memory that the caller owns, as address, shape and dtype."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tango_plugins.errors import TangoError


@dataclass(frozen=True)
class DeviceArray:
    """Contiguous device memory.

    Attributes:
        address: Address of the first element.
        shape: Length of each axis.
        dtype: Name of the dtype in NumPy: ``float16``, ``int32``, …; FP8 is ``float8_e4m3fn``.
        owner: An object that keeps the memory allocated, if that is needed.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * item_bytes(self.dtype)

    @classmethod
    def of(cls, array: Any, name: str = "array") -> DeviceArray:
        """The device memory of an object with ``__cuda_array_interface__`` or ``__dlpack__``, without a copy.

        Raises:
            TangoError: It has none, or is not contiguous.
        """
        if isinstance(array, DeviceArray):
            return array
        if hasattr(array, "__cuda_array_interface__"):
            described = array.__cuda_array_interface__
            shape, strides = tuple(described["shape"]), described.get("strides")
            code, size = described["typestr"][1], int(described["typestr"][2:])
            if strides is not None and not _contiguous(shape, [stride // size for stride in strides]):
                raise TangoError(f"{name} is not contiguous", "pass a contiguous copy")
            dtypes = {"f": "float", "i": "int", "u": "uint", "b": "bool"}
            return cls(int(described["data"][0]), shape, f"{dtypes.get(code, code)}{size * 8}", array)
        if is_on_device(array):
            return _from_dlpack(array, name)
        hint = "it must have __cuda_array_interface__ or __dlpack__: a torch tensor or a CuPy array on the GPU"
        raise TangoError(f"{name} is a {type(array).__name__}, which has no device pointer", hint)


def is_on_device(array: Any) -> bool:
    """Whether an object is an array in a GPU's memory."""
    if isinstance(array, DeviceArray) or hasattr(array, "__cuda_array_interface__"):
        return True
    return hasattr(array, "__dlpack_device__") and int(array.__dlpack_device__()[0]) in _CUDA_DEVICES


class _DLTensor(ctypes.Structure):
    """DLTensor of DLPack's ABI 0 and 1, whose DLManagedTensor begins with it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


#: DLDeviceType: kDLCUDA and kDLCUDAManaged.
_CUDA_DEVICES = (2, 13)

#: DLDataTypeCode, and its name in NumPy.
_DLPACK_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}


def _from_dlpack(array: Any, name: str) -> DeviceArray:
    capsule = array.__dlpack__()  # never consumed, so its destructor releases the memory
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides and not _contiguous(shape, tensor.strides[: tensor.ndim]):
        raise TangoError(f"{name} is not contiguous", "pass a contiguous copy")
    dtype = f"{_DLPACK_CODES.get(tensor.code, f'code {tensor.code}, ')}{tensor.bits}"
    return DeviceArray((tensor.data or 0) + tensor.byte_offset, shape, dtype, capsule)


def _contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True


def item_bytes(dtype: str) -> int:
    """Bytes per element of a dtype, by its NumPy name."""
    return int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz").partition("_")[0]) // 8
