"""Takes the functions out of an ONNX file, without onnx: the runtime does not have it.

A device graph carries an ONNX function of each of its operators. TensorRT shall take the plugins: the parser of 10.0
prefers the functions, and those of later versions take them in silence where there is no plugin. The cache of a decoder
that is made of functions would be a copy.
"""

from __future__ import annotations

from collections.abc import Iterator

#: Number of ModelProto.functions (onnx.proto3).
_FUNCTIONS = 25

#: Wire types of protobuf (Protocol Buffers, "Encoding"): a varint, eight bytes, a length and so many bytes, four bytes.
_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5


def without_functions(model: bytes) -> bytes:
    """A serialized ModelProto without its functions; all other bytes are kept.

    Raises:
        ValueError: It is no ModelProto.
    """
    return b"".join(model[begin:end] for number, begin, end in _fields(model) if number != _FUNCTIONS)


def _fields(message: bytes) -> Iterator[tuple[int, int, int]]:
    """Number of each field of a message, and where it begins and ends, its key included."""
    at = 0
    while at < len(message):
        begin = at
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            _, at = _varint(message, at)
        elif wire == _LENGTH:
            length, at = _varint(message, at)
            at += length
        elif wire in (_EIGHT, _FOUR):
            at += 8 if wire == _EIGHT else 4
        else:
            raise ValueError(f"a field of wire type {wire} at byte {begin}")
        if number == 0 or at > len(message):
            raise ValueError(f"a field that does not end, or has no number, at byte {begin}")
        yield number, begin, at


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte, at = message[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number that does not end at byte {at}")
