"""Linear layers that a checkpoint stores in 4 bits, as AWQ or GPTQ made them: repacked, not quantized again.

For a layer of ``in`` inputs, in groups, and ``out`` outputs both methods store three tensors in the place of ``weight``
[out, in], with eight elements in an int32, the first in the lowest bits:

============  ======================  ======================
tensor        AWQ                     GPTQ
============  ======================  ======================
``qweight``   [in, out / 8]           [in / 8, out]
``qzeros``    [in / group, out / 8]   [in / group, out / 8]
``scales``    [in / group, out]       [in / group, out]
============  ======================  ======================

An element is ``(q − zero) · scale``. AWQ's eight columns are in the order 0, 2, 4, 6, 1, 3, 5, 7. GPTQ's first format
stores zero points less one, its second as they are; ``g_idx`` [in] names the group of each input. Sources: AutoAWQ's
``packing_utils.py``, AutoGPTQ's ``qlinear_cuda.py`` and GPTQModel's ``checkpoint_format``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_plugins.matrix import GROUPS
from tango_runtime.util.jsonschema import shown

Array = NDArray[Any]
Read = Callable[[str], Array]

BITS: Literal[4] = 4

#: Elements of an int32.
_PACKED = 8

#: The column that each element of an int32 is of, in AWQ's.
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)

#: The zero point of weights that are quantized symmetrically.
MIDDLE = 1 << (BITS - 1)

_GIVE_OTHER = "give the original checkpoint, and quantize its bundle with tango calibrate"


@dataclass(frozen=True)
class Packing:
    """How a checkpoint stores its 4-bit layers.

    A layer is named as its tensors are, without ``.weight`` or what stands in its place.

    Attributes:
        method: What made them.
        group: Inputs that share a scale.
        zero_offset: What to add to a stored zero point.
        symmetric: Every zero point is ``MIDDLE``.
    """

    method: Literal["awq", "gptq"]
    group: int
    zero_offset: int = 0
    symmetric: bool = False

    def shape(self, qweight: tuple[int, ...]) -> tuple[int, ...]:
        """[out, in] of a layer, by the shape of its ``qweight``."""
        if len(qweight) != 2:
            return qweight
        rows, columns = qweight
        return (columns * _PACKED, rows) if self.method == "awq" else (columns, rows * _PACKED)

    def part_shapes(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a layer."""
        groups = inputs // self.group
        packed = (inputs, outputs // _PACKED) if self.method == "awq" else (inputs // _PACKED, outputs)
        return {"qweight": packed, "qzeros": (groups, outputs // _PACKED), "scales": (groups, outputs)}

    def values(self, read: Read, layer: str) -> NDArray[np.uint8]:
        """Elements [out, groups, group / 2], two in a byte, the first in the low half."""
        if self.symmetric:
            self.zeros(read, layer)  # nothing else reads them
        words = read(f"{layer}.qweight")
        if self.method == "awq":
            packed = _pack(np.ascontiguousarray(self._columns(words).T))
        else:
            packed = np.ascontiguousarray(words.T).view(np.uint8)
        return np.asarray(packed.reshape(len(packed), -1, self.group * BITS // 8), np.uint8)

    def scales(self, read: Read, layer: str) -> Array:
        """Scales [out, groups]."""
        return read(f"{layer}.scales").T

    def zeros(self, read: Read, layer: str) -> NDArray[np.uint8]:
        """Zero points [out, groups], one in a byte.

        Raises:
            TangoError: One of them is out of range, or is not the middle although the checkpoint says so.
        """
        found = np.asarray(self._columns(read(f"{layer}.qzeros")).T + self.zero_offset, np.uint8)
        if found.max(initial=0) >= 1 << BITS:
            raise TangoError(f"{layer}.qzeros has a zero point of {found.max()}", _GIVE_OTHER)
        if self.symmetric and not (found == MIDDLE).all():
            raise TangoError(f"{layer}.qzeros has other zero points than {MIDDLE}", "its config.json says sym: true")
        return found

    def packed_zeros(self, read: Read, layer: str) -> NDArray[np.uint8]:
        """Zero points [out, ⌈groups / 2⌉], two in a byte, the first in the low half."""
        zeros = self.zeros(read, layer)
        return _pack(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))

    def weight(self, read: Read, layer: str) -> NDArray[np.float32]:
        """The weight, [out, in]."""
        packed = self.values(read, layer)
        wide = _unpack(packed).reshape(*packed.shape[:2], self.group).astype(np.float32)
        scales = self.scales(read, layer).astype(np.float32)
        wide -= self.zeros(read, layer)[..., None]
        wide *= scales[..., None]
        return np.asarray(wide.reshape(len(wide), -1), np.float32)

    def _columns(self, words: Array) -> NDArray[np.uint8]:
        """int32 [rows, columns / 8] → [rows, columns] uint8."""
        elements = _unpack(np.ascontiguousarray(words).view(np.uint8)).reshape(len(words), -1, _PACKED)
        in_order = elements[..., np.argsort(_AWQ_COLUMNS)] if self.method == "awq" else elements
        return in_order.reshape(len(words), -1)


def _unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., bytes] → [..., bytes, 2], the low half first."""
    return np.stack((packed & np.uint8(15), packed >> np.uint8(BITS)), -1).astype(np.uint8, copy=False)


def _pack(elements: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[rows, columns] → [rows, columns / 2], the first in the low half."""
    return elements[:, ::2] | (elements[:, 1::2] << np.uint8(BITS))


def parse_packing(settings: Mapping[str, Any], where: str) -> Packing:
    """Reads how a checkpoint was quantized.

    Args:
        settings: ``quantization_config`` of its config.json, or a file of its own.
        where: Which of them, for messages.

    Raises:
        TangoError: It is quantized in another way; the message names it.
    """
    # Files of their own, which older checkpoints have, do not name the method.
    method = settings.get("quant_method", "gptq" if "desc_act" in settings else "awq" if "w_bit" in settings else None)
    if method not in ("awq", "gptq"):
        raise _other(where, "quant_method", method, "awq or gptq")
    bits = settings.get("bits", settings.get("w_bit"))
    if type(bits) is not int or bits != BITS:
        raise _other(where, "bits", bits, str(BITS))
    group = settings.get("group_size", settings.get("q_group_size"))
    if type(group) is not int or group not in GROUPS:
        raise _other(where, "group_size", group, ", ".join(map(str, GROUPS)))
    return _awq(settings, where, group) if method == "awq" else _gptq(settings, where, group)


def _awq(settings: Mapping[str, Any], where: str, group: int) -> Packing:
    _form(settings, where, ("version", "checkpoint_format", "format"), ("gemm",))
    if settings.get("zero_point", True) is not True:
        raise _other(where, "zero_point", settings["zero_point"], "true")
    return Packing("awq", group)


def _gptq(settings: Mapping[str, Any], where: str, group: int) -> Packing:
    form = _form(settings, where, ("checkpoint_format", "format"), ("gptq", "gptq_v2"))
    if settings.get("is_marlin_format"):  # as files call it that were made before checkpoint_format
        raise _other(where, "is_marlin_format", settings["is_marlin_format"], "false")
    # With desc_act, inputs may be in the order of their activations; g_idx tells whether they are.
    return Packing("gptq", group, int(form == "gptq"), settings.get("sym") is True)


def _form(settings: Mapping[str, Any], where: str, keys: tuple[str, ...], known: tuple[str, ...]) -> str:
    """The format that these keys name, whichever of them a program writes; the first that is known if none does.

    Raises:
        TangoError: It is not known, or they name different ones.
    """
    named = {key: value for key in keys if (value := settings.get(key)) is not None}
    for key, value in named.items():
        if not isinstance(value, str) or value.lower() not in known:
            raise _other(where, key, value, " or ".join(known))
    forms = {value.lower() for value in named.values()} or {known[0]}
    if len(forms) > 1:
        raise TangoError(f"{where}: {' and '.join(named)} name different formats", _GIVE_OTHER)
    return str(forms.pop())


def _other(where: str, key: str, value: object, known: str) -> TangoError:
    return TangoError(f"{where}: {key} is {shown(value)}, and only {known} is read", _GIVE_OTHER)
