"""Device memory that the caller owns, as address, shape and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tango_plugins.errors import TangoError


@dataclass(frozen=True)
class DeviceArray:
    """Contiguous device memory: its address, shape and dtype (``float16``, ``int32``, …)."""

    address: int
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array: Any, name: str = "array") -> DeviceArray:
        """The device memory of an object with ``__cuda_array_interface__``.

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
            return cls(int(described["data"][0]), shape, f"{dtypes.get(code, code)}{size * 8}")
        hint = "it must have __cuda_array_interface__: a torch tensor or a CuPy array on the GPU"
        raise TangoError(f"{name} is a {type(array).__name__}, which has no device pointer", hint)


def _contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True


def item_bytes(dtype: str) -> int:
    """Bytes per element of a dtype, by its NumPy name."""
    return int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8
