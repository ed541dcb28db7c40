"""The decoder graph and its cache; the rows of the vocabulary that are padding."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer

from tango_export.export import Request, export
from tango_runtime.bundle import Bundle
from tests.export.edits import Decoder, assert_close, copied, edit_weights, embed, logits

IDS = np.random.default_rng(3).integers(0, 300, 12)


@pytest.fixture(scope="module")
def decoder_bundle(bundle):
    # Without outliers: with them the scores reach 2e4, and fp32 itself rounds differently from pass to pass.
    return bundle(precision="fp32", outliers=False)


def test_token_by_token_equals_one_pass(decoder_bundle):
    decoder, embeddings = Decoder(decoder_bundle, len(IDS)), embed(decoder_bundle, IDS)
    for n in range(len(IDS)):
        stepped = decoder.step(embeddings[n : n + 1])
        assert_close(stepped, logits(decoder_bundle, IDS[: n + 1]), 1e-5)


@pytest.mark.parametrize("chunks", [(1, 11), (7, 5), (2, 3, 7)])
def test_prefill_in_pieces_equals_one_pass(decoder_bundle, chunks):
    decoder, embeddings, begin = Decoder(decoder_bundle, len(IDS) + 9), embed(decoder_bundle, IDS), 0
    for n in chunks:
        found, begin = decoder.step(embeddings[begin : begin + n]), begin + n
    assert_close(found, logits(decoder_bundle, IDS), 1e-5)


@pytest.mark.parametrize("spare", range(0, 10, 3))
def test_what_lies_beyond_the_cached_length_does_not_matter(decoder_bundle, spare):
    embeddings = embed(decoder_bundle, IDS)
    roomy = Decoder(decoder_bundle, len(IDS) - 1 + spare)  # its cache is full of garbage
    roomy.step(embeddings[:-1])
    assert_close(roomy.step(embeddings[-1:]), logits(decoder_bundle, IDS), 1e-5)


def test_cache_and_one_pass_agree_on_outliers_in_fp16(bundle):
    decoder, embeddings = Decoder(bundle(), len(IDS) + 4), embed(bundle(), IDS)
    decoder.step(embeddings[:-1])
    assert_close(decoder.step(embeddings[-1:]), logits(bundle(), IDS), 1e-2)


def test_of_the_last_layer_only_the_last_position_is_computed(decoder_bundle):
    graph = onnx.shape_inference.infer_shapes(
        onnx.load(decoder_bundle / "decoder.onnx", load_external_data=False)
    ).graph
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.value_info}
    last = Bundle.load(decoder_bundle).manifest.decoder.layers - 1
    rows = [shape[0] for name, shape in shapes.items() if f"layers.{last}.mlp." in name and len(shape) == 2]
    assert rows
    assert set(rows) == {1}
    rows = [shape[0] for name, shape in shapes.items() if "layers.0.mlp." in name and len(shape) == 2]
    assert set(rows) == {0}  # of any number


def test_new_rows_are_the_new_tokens_only(decoder_bundle):
    decoder = Decoder(decoder_bundle, 9)
    before = {name: rows.copy() for name, rows in decoder.cache.items()}
    decoder.step(embed(decoder_bundle, IDS[:4]))
    for name, rows in decoder.cache.items():
        assert not np.array_equal(rows[:, :4], before[name][:, :4])
        np.testing.assert_array_equal(rows[:, 4:], before[name][:, 4:])


def test_padding_rows_of_the_vocabulary_give_no_logit(checkpoint, bundle, tmp_path):
    llava, siglip = copied(checkpoint(tied=False), tmp_path)
    known = Tokenizer.from_file(str(llava / "tokenizer.json")).get_vocab_size()

    def loud(weights):
        head = weights["language_model.lm_head.weight"]
        assert len(head) > known
        head[known:] = 1000.0

    edit_weights(llava, loud)
    output = export(Request(checkpoint=str(llava), salience=str(siglip), output=tmp_path / "out"))
    assert Bundle.load(output).manifest.prompt.vocabulary == known
    found = logits(output, IDS)
    assert found.shape == (known,)
    np.testing.assert_array_equal(found, logits(bundle(tied=False), IDS))
