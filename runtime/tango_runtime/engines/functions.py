"""Takes the functions out of an ONNX file.

A device graph carries an ONNX function of each of its operators. TensorRT must take the plugins: the parser of 10.0
prefers the functions, and those of later versions take them in silence where there is no plugin. The cache of a decoder
that is made of functions would be a copy.
"""

from __future__ import annotations

from tango_runtime.util.protobuf import fields

#: Number of ModelProto.functions (onnx.proto3).
_FUNCTIONS = 25


def without_functions(model: bytes) -> bytes:
    """A serialized ModelProto without its functions; all other bytes are kept.

    Raises:
        ValueError: It is no protobuf message.
    """
    return b"".join(stored for number, stored, _ in fields(memoryview(model)) if number != _FUNCTIONS)
