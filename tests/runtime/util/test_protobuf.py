"""Fields of protobuf messages, against onnx."""

from __future__ import annotations

import onnx
import pytest

from tango_runtime.util.protobuf import fields


def test_fields_are_those_that_were_written():
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), producer_name="x")
    data = model.SerializeToString()
    found = list(fields(memoryview(data)))
    assert b"".join(stored for _, stored, _ in found) == data
    contents = {onnx.ModelProto.DESCRIPTOR.fields_by_number[n].name: content for n, _, content in found}
    assert contents["ir_version"] is None
    assert bytes(contents["producer_name"]) == b"x"
    assert onnx.GraphProto.FromString(bytes(contents["graph"])) == model.graph


@pytest.mark.parametrize(
    "damaged",
    [
        b"\x0b",  # field 1 of wire type 3, which proto3 has not
        b"\x00\x01",  # number 0
        b"\x0a\x05abc",  # five bytes, of which there are three
        b"\x0d\x01\x02\x03",  # four bytes, of which there are three
        b"\x09\x01",  # eight bytes, of which there is one
        b"\x08" + 11 * b"\xff",  # a number of more than 64 bits
        b"\x80",  # half of a key
    ],
)
def test_what_is_no_message_is_rejected(damaged):
    with pytest.raises(ValueError, match="it "):
        list(fields(memoryview(damaged)))
