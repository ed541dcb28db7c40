"""Decode steps of the CUDA library on random decoders, against fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tango_plugins import TangoError
from tango_plugins.decoder import DecoderShape
from tests.plugins.decoders import EPS, Batch, Decoder, check_batch, check_next, check_step, error, reference
from tests.plugins.matrices import FORMATS

SHAPES = {
    "tests": DecoderShape(2, 64, 4, 2, 16, 128, 420, 448, 512, EPS),
    "tiny": DecoderShape(6, 256, 8, 2, 32, 704, 500, 512, 4096, EPS),
    "odd": DecoderShape(3, 144, 3, 1, 48, 208, 300, 304, 700, EPS),
    "wide heads": DecoderShape(2, 2048, 16, 1, 256, 512, 1000, 1008, 8192, EPS),
    "0.5b": DecoderShape(3, 896, 14, 2, 64, 4864, 151646, 152000, 8192, EPS),
    "7b": DecoderShape(2, 3584, 28, 4, 128, 18944, 151646, 152128, 8192, EPS),
}


@pytest.fixture(scope="module", params=SHAPES)
def decoder(request):
    return Decoder(SHAPES[request.param])


def positions(shape):
    known = (0, 1, 2, 31, 62, 63, 64, 65, 127, 128, 129, 500, 671, 2047, 5000)
    return [p for p in known if p < shape.capacity - 1] + [shape.capacity - 1]


def test_logits_and_new_rows_equal_fp64(decoder):
    for position in positions(decoder.shape):
        check_step(decoder, position)


def test_a_step_of_a_token_that_was_found_is_its_own(decoder):
    check_next(decoder, min(671, decoder.shape.capacity - 1), 33)


@pytest.mark.parametrize("form", [*FORMATS, "fp8"])
@pytest.mark.parametrize("name", ["tests", "odd", "0.5b", "7b"])
def test_quantized_weights_are_what_they_stand_for(name, form):
    decoder = Decoder(SHAPES[name], formats=(form,))
    for position in (0, 64, 400):
        check_step(decoder, position)


def test_formats_may_differ_from_matrix_to_matrix():
    for blocks in (0, 3):
        decoder = Decoder(SHAPES["tiny"], blocks=blocks, formats=("int4-32", "fp16", "int8", "int8-32", "int4-64"))
        check_step(decoder, 300)


@pytest.mark.parametrize("form", ["int8", "int4-32", "int4-128-zeros", "fp8"])
def test_quantized_weights_give_the_same_bits_every_time(form):
    decoder = Decoder(SHAPES["0.5b"], formats=(form,))
    embedding = decoder.embedding()
    wanted = decoder.step(embedding, 671)
    for _ in range(200):
        assert torch.equal(decoder.step(embedding, 671), wanted)


@pytest.mark.parametrize("blocks", [1, 3, 8, 16, 84])
@pytest.mark.parametrize("name", ["tests", "odd", "0.5b", "7b"])
def test_fewer_blocks_give_the_same(name, blocks):
    """As many blocks as an Orin Nano, an Orin and others have SMs."""
    decoder = Decoder(SHAPES[name], blocks=blocks)
    for position in (0, 64, 400):
        check_step(decoder, position)


def test_the_same_bits_every_time(decoder):
    embedding, position = decoder.embedding(), min(671, decoder.shape.capacity - 1)
    wanted = decoder.step(embedding, position)
    for _ in range(50):
        assert torch.equal(decoder.step(embedding, position), wanted)


def test_cache_rows_after_the_position_are_not_read(decoder):
    embedding, position = decoder.embedding(), min(100, decoder.shape.capacity - 2)
    wanted = decoder.step(embedding, position)
    for rows in decoder.cache:
        rows[:, position + 1 :] = torch.nan
    assert torch.equal(decoder.step(embedding, position), wanted)
    for rows in decoder.cache:
        rows[:, position + 1 :] = 0


def test_large_scores_and_residuals_stay_finite():
    """Key biases of 150 and residual channels of 1e4, as Qwen2 has them."""
    decoder = Decoder(SHAPES["0.5b"], seed=1)
    shape = decoder.shape
    for i in range(shape.layers):
        bias = decoder.weights[f"layers.{i}.self_attn.qkv_proj.bias"]
        bias[shape.heads * shape.head_dim :: 7] = 150
        decoder.cache[2 * i][:, :, 5] = 150
    embedding = decoder.embedding()
    embedding[3] = 3e4
    found = decoder.step(embedding, 700)
    wanted = reference(decoder, embedding, 700, [rows.clone() for rows in decoder.cache])
    assert torch.isfinite(found).all()
    assert error(found, wanted) < 1e-3


def test_a_graph_captures_it():
    decoder = Decoder(SHAPES["tiny"])
    embedding, graph = decoder.embedding(), torch.cuda.CUDAGraph()
    wanted = decoder.step(embedding, 40)
    with torch.cuda.graph(graph):
        decoder.enqueue(embedding, 40)
    decoder.logits.fill_(torch.nan)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(decoder.logits, wanted)


def test_ten_thousand_steps_in_a_row():
    decoder = Decoder(SHAPES["tests"])
    embedding = decoder.embedding()
    wanted = decoder.step(embedding, 300)
    free = torch.cuda.mem_get_info()[0]
    for i in range(10_000):
        decoder.enqueue(embedding, i % 300)
    assert torch.cuda.mem_get_info()[0] == free
    assert not torch.equal(decoder.step(embedding, 300), wanted)  # the rows before it have changed
    cache = [rows.clone() for rows in decoder.cache]
    assert error(decoder.step(embedding, 300), reference(decoder, embedding, 300, cache)) < 2e-4


def test_two_streams_at_once():
    """Each step needs the whole GPU, so the steps must run one after the other, without a deadlock."""
    decoders, streams = [Decoder(SHAPES["0.5b"], seed) for seed in (0, 1)], [torch.cuda.Stream() for _ in range(2)]
    embeddings = [decoder.embedding() for decoder in decoders]
    wanted = [decoder.step(embedding, 300) for decoder, embedding in zip(decoders, embeddings, strict=True)]
    for _ in range(200):
        for decoder, embedding, stream in zip(decoders, embeddings, streams, strict=True):
            with torch.cuda.stream(stream):
                decoder.enqueue(embedding, 300)
    torch.cuda.synchronize()
    for decoder, logits in zip(decoders, wanted, strict=True):
        assert torch.equal(decoder.logits, logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 72}, "hidden_size is 72: it must be a multiple of 16"),
        ({"heads": 3}, "heads is 3: it must be a multiple of kv_heads"),
        ({"head_dim": 512}, "head_dim is 512: it must be from 16 to 256"),
        ({"vocabulary": 449}, "vocabulary is 449: it must be from 1 to 448"),
        ({"layers": 0}, "layers is 0"),
    ],
)
def test_a_wrong_shape_is_rejected_by_name(change, message):
    with pytest.raises(TangoError, match=message):
        Decoder(dataclasses.replace(SHAPES["tests"], **change))


def test_more_blocks_than_sms_are_rejected():
    most = torch.cuda.get_device_properties(0).multi_processor_count
    with pytest.raises(TangoError, match=f"blocks is {most + 1}: it must be from 0 to {most}"):
        Decoder(SHAPES["tests"], blocks=most + 1)


def test_a_position_outside_of_the_cache_is_rejected():
    decoder = Decoder(SHAPES["tests"])
    with pytest.raises(TangoError, match="position is 512: it must be from 0 to 511"):
        decoder.enqueue(decoder.embedding(), 512)


#: Positions of a batch's sequences, in caches of 520 positions.
BATCH = (0, 1, 127, 128, 129, 300, 400, 499)


def batch_of(decoder, blocks=0):
    return Batch(decoder, BATCH, (520,) * len(BATCH), blocks=blocks)


def test_a_batch_equals_fp64(decoder):
    batch = batch_of(decoder)
    for chosen in ([7], [6, 2, 4], list(range(8))):
        check_batch(batch, chosen)


@pytest.mark.parametrize("form", [*FORMATS, "fp8"])
@pytest.mark.parametrize("name", ["tests", "odd", "7b"])
def test_a_batch_reads_quantized_weights(name, form):
    check_batch(batch_of(Decoder(SHAPES[name], formats=(form,))), list(range(8)))


# One or three blocks have no room for the inputs of the widest shape.
@pytest.mark.parametrize(
    ("name", "blocks"),
    [(name, n) for name in ("tests", "odd") for n in (1, 3, 8, 16, 84)] + [("0.5b", n) for n in (8, 16, 84)],
)
def test_a_batch_takes_fewer_blocks(name, blocks):
    check_batch(batch_of(Decoder(SHAPES[name], blocks=blocks), blocks), list(range(8)))


@pytest.mark.parametrize("form", ["fp16", "int8", "int4-32", "fp8"])
@pytest.mark.parametrize("name", ["odd", "0.5b", "7b"])
def test_a_sequence_has_the_same_bits_whatever_the_others_are(name, form):
    batch = batch_of(Decoder(SHAPES[name], formats=(form,)))
    batch.spoil()  # nothing after a position is read
    logits, rows = batch.step(list(range(8)))
    for chosen in ([0], [7], [7, 3, 0], list(range(7, -1, -1)), *([list(range(8))] * 50)):
        for i, own, new in zip(chosen, *batch.step(chosen), strict=True):
            assert torch.equal(own, logits[i])
            assert all(torch.equal(a, b) for a, b in zip(new, rows[i], strict=True))


def test_a_long_sequence_in_a_batch():
    decoder = Decoder(dataclasses.replace(SHAPES["tiny"], capacity=20_000))
    check_batch(Batch(decoder, (19_999, 8191, 8192, 5), (20_000, 8192, 8193, 64)), [0, 1, 2, 3])
