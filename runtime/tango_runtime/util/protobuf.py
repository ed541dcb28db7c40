"""The fields of a protobuf message, for what must be known of an ONNX file: the runtime has no onnx.

Protocol Buffers Documentation, "Encoding": a message is its fields one after the other, each a number with a wire
type, and a value.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview | None]]:
    """The number of each field, the field as it is stored, and its content where that is a string or a message.

    Raises:
        ValueError: It is no message.
    """
    at = 0
    while at < len(message):
        begin, content = at, None
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, at = _varint(message, at)
        elif wire == _BYTES:
            size, at = _varint(message, at)
            content = message[at : at + size]
            at += size
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"it has a field of wire type {wire}")
        if number == 0:
            raise ValueError("it has a field 0")
        if at > len(message):
            raise ValueError("it is cut")
        yield number, message[begin:at], content


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value & (2**64 - 1), at
        if shift > 63:
            raise ValueError("it has an integer of more than ten bytes")
    raise ValueError("it is cut")
