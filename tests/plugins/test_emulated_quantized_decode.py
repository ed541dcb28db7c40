"""A decode step with quantized weights in the CUDA emulator, against the same step with what the weights stand for."""

from __future__ import annotations

from functools import cache

import pytest

from tango_plugins import TangoError
from tango_plugins.decoder import DecoderShape
from tests.plugins.cuda_emulator import compiled
from tests.plugins.decoders import EPS, Decoder, check_step
from tests.plugins.matrices import FORMATS

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

SHAPES = {
    "tests": DecoderShape(1, 64, 4, 2, 16, 128, 420, 448, 512, EPS),
    "odd": DecoderShape(2, 144, 3, 1, 48, 208, 300, 304, 700, EPS),
    "many rows": DecoderShape(1, 32, 2, 1, 16, 1008, 60, 64, 80, EPS),
    "blocks with nothing to do": DecoderShape(1, 16, 1, 1, 16, 256, 250, 256, 80, EPS),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cache(lambda: compiled(tmp_path_factory.mktemp("decode"), "decode"))


@pytest.mark.parametrize("form", [*FORMATS, "fp8"])
def test_logits_and_new_rows_equal_fp64(library, form):
    check_step(Decoder(SHAPES["tests"], library=library(), blocks=3, device="cpu", formats=(form,)), 65)


@pytest.mark.parametrize(("shape", "blocks"), [("odd", 2), ("many rows", 3), ("blocks with nothing to do", 3)])
@pytest.mark.parametrize("form", ["int8", "int4-32-zeros", "int4-128", "int8-32", "fp8"])
def test_it_takes_odd_shapes(library, shape, blocks, form):
    check_step(Decoder(SHAPES[shape], library=library(), blocks=blocks, device="cpu", formats=(form,)), 70)


def test_formats_may_differ_from_matrix_to_matrix(library):
    formats = ("int4-32", "fp16", "int8", "int8-32", "int4-128-zeros", "fp8")
    check_step(Decoder(SHAPES["odd"], library=library(), blocks=2, device="cpu", formats=formats), 33)


@pytest.mark.parametrize(("form", "formats"), [("fp16", 0), ("int4-32", 2), ("int8", 1), ("int8-32", 1), ("fp8", 1)])
def test_matrices_of_one_format_say_so(library, form, formats):
    decoder = Decoder(SHAPES["tests"], library=library(), blocks=3, device="cpu", formats=(form,))
    assert decoder.decoder._shape.formats == formats


@pytest.mark.parametrize(("formats", "head"), [(0, "int4-32"), (2, "fp16"), (2, "int8-32")])
def test_a_head_of_another_format_than_the_shape_says_is_rejected(library, formats, head):
    decoder = Decoder(SHAPES["tests"], library=library(), blocks=3, device="cpu", formats=(head,))
    decoder.decoder._shape.formats = formats
    with pytest.raises(TangoError, match=f"head has weights of format .*, but formats is {formats}"):
        decoder.step(decoder.embedding(), 65)


def test_formats_beyond_the_last_are_rejected(library):
    decoder = Decoder(SHAPES["tests"], library=library(), blocks=3, device="cpu", formats=("int4-32",))
    decoder.decoder._shape.formats = 3
    with pytest.raises(TangoError, match="formats is 3: it must be from 0 to 2"):
        decoder.step(decoder.embedding(), 65)
