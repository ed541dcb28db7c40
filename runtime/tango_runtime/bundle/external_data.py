"""Which files an ONNX graph keeps tensors in, read from its protobuf.

A graph may name any file on the disk there, and ONNX Runtime up to 1.23 reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tango_runtime.util.protobuf import fields

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


def external_files(file: Path) -> set[str]:
    """The files that the tensors of a graph lie in, as the graph names them.

    Args:
        file: The ONNX file.

    Raises:
        ValueError: It is not the protobuf of a graph.
    """
    try:
        return set(_locations(memoryview(file.read_bytes()), "model"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _locations(message: memoryview, kind: str) -> Iterator[str]:
    parts = [(number, content) for number, _, content in fields(message) if content is not None]
    if kind == "entry":
        texts = [bytes(content).decode(errors="surrogateescape") for _, content in parts]
        if "location" in texts:  # a key; in whatever order, and however often, the entry's fields are written
            yield from (text for text in texts if text != "location")
        return
    for number, content in parts:
        if (inner := _FIELDS[kind].get(number)) is not None:
            yield from _locations(content, inner)
