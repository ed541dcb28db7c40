"""A decode step of several sequences in the CUDA emulator, against fp64 and against fewer sequences."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from tango_plugins import TangoError
from tango_plugins.decoder import DecoderShape
from tests.plugins.cuda_emulator import compiled
from tests.plugins.decoders import EPS, Batch, Decoder, check_batch, error
from tests.plugins.matrices import FORMATS

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

SHAPES = {
    "tests": DecoderShape(2, 64, 4, 2, 16, 128, 420, 448, 512, EPS),
    "odd": DecoderShape(2, 144, 3, 1, 48, 208, 300, 304, 700, EPS),
    "many rows": DecoderShape(1, 32, 2, 1, 16, 1008, 60, 64, 80, EPS),
    "blocks with nothing to do": DecoderShape(1, 16, 1, 1, 16, 256, 250, 256, 80, EPS),
    "several tiles a block": DecoderShape(1, 32, 2, 1, 16, 64, 900, 912, 80, EPS),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cache(lambda: compiled(tmp_path_factory.mktemp("decode"), "decode"))


def make(library, shape, blocks, positions, capacities, formats=("fp16",)):
    decoder = Decoder(SHAPES[shape], library=library(), blocks=blocks, device="cpu", formats=formats)
    return Batch(decoder, positions, capacities, library(), blocks)


@pytest.mark.parametrize("form", ["fp16", *FORMATS, "fp8"])
def test_logits_and_new_rows_equal_fp64(library, form):
    batch = make(library, "tests", 3, (65, 0, 300), (512, 64, 304), (form,))
    check_batch(batch, [0, 1, 2])


@pytest.mark.parametrize(
    ("shape", "blocks"), [("odd", 2), ("many rows", 3), ("blocks with nothing to do", 3), ("several tiles a block", 1)]
)
@pytest.mark.parametrize("form", ["fp16", "int8", "int4-32-zeros", "int8-32", "fp8"])
def test_it_takes_odd_shapes(library, shape, blocks, form):
    check_batch(make(library, shape, blocks, (70, 3), (80, 64), (form,)), [0, 1])


def test_formats_may_differ_from_matrix_to_matrix(library):
    formats = ("int4-32", "fp16", "int8", "int8-32", "int4-128-zeros", "fp8")
    check_batch(make(library, "odd", 2, (33, 7), (64, 64), formats), [0, 1])


@pytest.mark.parametrize("form", ["fp16", "int8", "int4-32", "fp8"])
def test_a_sequence_has_the_same_bits_whatever_the_others_are(library, form):
    batch = make(library, "tests", 3, (5, 0, 140, 1, 2, 3, 20, 9), (64, 32, 160, 32, 32, 32, 32, 32), (form,))
    batch.spoil()  # nothing after a position is read
    logits, rows = batch.step([0, 1, 2, 3, 4, 5, 6, 7])
    for chosen in ([0], [2, 0], [7, 6, 5, 4, 3, 2, 1, 0]):
        found = batch.step(chosen)
        for i, own, new in zip(chosen, *found, strict=True):
            assert torch.equal(own, logits[i])
            assert all(torch.equal(a, b) for a, b in zip(new, rows[i], strict=True))


@pytest.mark.parametrize("form", ["fp16", "fp8"])
def test_it_is_the_step_of_one_sequence_to_rounding(library, form):
    batch = make(library, "tests", 3, (65, 130), (512, 512), (form,))
    for i, found in enumerate(batch.step([0, 1])[0]):
        for own, rows in zip(batch.decoder.cache, batch.caches[i], strict=True):
            own.copy_(rows)
        wanted = batch.decoder.step(batch.embeddings[i], batch.positions[i], batch.rotations[i])
        assert error(found, wanted.double()) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": 64}, "position is 64: it must be from 0 to 63"),
        ({"rotation": -1}, "rotation is -1: it must be from 0 to 16777216"),
        ({"capacity": 0}, "capacity is 0"),
        ({"caches": None}, "there is no weight caches"),
    ],
)
def test_a_bad_sequence_is_rejected_by_name(library, change, message):
    batch = make(library, "tests", 3, (5,), (64,))
    good = batch.sequence(0)
    with pytest.raises(TangoError, match=message):
        batch.enqueue_sequences([dataclasses.replace(good, **change)])


@pytest.mark.parametrize("count", [0, 9])
def test_the_number_of_sequences_is_limited(library, count):
    batch = make(library, "tests", 3, (5,), (64,))
    with pytest.raises(TangoError, match=f"count is {count}: it must be from 1 to 8"):
        batch.enqueue_sequences([batch.sequence(0)] * count)


def test_inputs_that_do_not_fit_into_a_block_are_rejected(library):
    wide = DecoderShape(1, 4160, 2, 1, 16, 32, 16, 16, 64, EPS)
    decoder = Decoder(wide, library=library(), blocks=1, device="cpu")
    with pytest.raises(TangoError, match="the inputs of 8 sequences do not fit into a block's shared memory"):
        Batch(decoder, (5,), (64,), library(), 1)
