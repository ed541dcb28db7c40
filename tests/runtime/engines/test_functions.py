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
    with pytest.raises(ValueError, match="it is cut"):
        without_functions(model[:-1])
