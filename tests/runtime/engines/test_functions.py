"""ONNX files without their functions, against onnx."""

from __future__ import annotations

import onnx
import pytest

from tango_runtime.bundle import Bundle
from tango_runtime.engines.functions import without_functions


@pytest.fixture(scope="module")
def model(bundle):
    loaded = Bundle.load(bundle())
    return loaded.engine_graph("decoder", "device").read_bytes()


def test_all_but_the_functions_is_kept(model):
    wanted = onnx.load_from_string(model)
    assert len(wanted.functions) > 0
    del wanted.functions[:]
    assert onnx.load_from_string(without_functions(model)) == wanted
    assert without_functions(without_functions(model)) == without_functions(model)


def test_a_file_that_ends_too_early_is_rejected(model):
    with pytest.raises(ValueError, match="does not end"):
        without_functions(model[:-1])


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
    with pytest.raises(ValueError, match=r"field|number"):
        without_functions(damaged)
