"""Which files an ONNX graph keeps tensors in, read from its protobuf: the runtime has no onnx.

A graph may name any file on the disk there, and ONNX Runtime up to 1.23 reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# The messages of onnx.proto that lead to a tensor, with the numbers of the fields that lead on.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def external_files(file: Path) -> set[str]:
    """The files that the tensors of a graph lie in, as the graph names them.

    Args:
        file: The ONNX file.

    Raises:
        ValueError: It is not the protobuf of a graph.
    """
    try:
        return set(_locations(memoryview(file.read_bytes()), "model"))
    except (IndexError, RecursionError) as error:
        raise ValueError("it is cut, or nested too deeply") from error


def _locations(message: memoryview, kind: str) -> Iterator[str]:
    if kind == "entry":
        texts = [bytes(value).decode(errors="surrogateescape") for _, value in _parts(message)]
        if "location" in texts:  # a key; in whatever order, and however often, the entry's fields are written
            yield from (text for text in texts if text != "location")
        return
    for field, value in _parts(message):
        if (inner := _FIELDS[kind].get(field)) is not None:
            yield from _locations(value, inner)


def _parts(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message that are bytes: strings and messages."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(message, at)
        elif wire == _BYTES:
            size, at = _varint(message, at)
            yield tag >> 3, message[at : at + size]
            at += size
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"it has a field of wire type {wire}")
    if at > len(message):
        raise ValueError("it is cut")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value & (2**64 - 1), at
        if shift > 63:
            raise ValueError("it has an integer of more than ten bytes")
