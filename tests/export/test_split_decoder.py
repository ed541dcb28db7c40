"""A decoder in two graphs: what is written, that it is the decoder where nothing is dropped, and what is refused."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import onnx
import pytest

from tango_export.export import Request, export
from tango_export.validate import validate
from tango_plugins import TangoError, op
from tango_runtime.bundle import Bundle, InnerPruning
from tango_runtime.cli.main import main


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """``made(dtype)``: a bundle of four layers, half of the video from the third on."""

    @cache
    def made(dtype, inner=(2, 0.5), outliers=False):
        llava, siglip = checkpoint("llava-video", layers=4, outliers=outliers)
        folder = tmp_path_factory.mktemp("inner") / "bundle"
        return export(
            Request(
                "llava-video",
                str(llava),
                str(siglip),
                folder,
                dtype=dtype,
                inner=InnerPruning(*inner) if inner else None,
            )
        )

    return made


@pytest.fixture(scope="module")
def half(made):
    return made("fp16")


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_it_validates(made, dtype, capsys):
    assert main(["validate", str(made(dtype))]) == 0
    found = capsys.readouterr().out
    assert "decoder_high" in found
    assert ("decoder_high (device)" in found) == (dtype == "fp16")


def test_where_nothing_is_dropped_its_device_form_gives_the_bits_of_one_graph(made):
    """So it loses to rounding what any decoder in fp16 does. With four layers and the outliers, these are percents of
    the logits' norm: the values' planted bias takes five of their bits, and each MLP multiplies what that changes."""
    split, whole = (logits_on_device(made("fp16", inner, outliers=True)) for inner in ((2, 0.5), None))
    assert len(split) == 5
    assert split == whole


def logits_on_device(folder):
    """How they compare with the original's, in all digits."""
    found = [each for each in validate(folder) if each.graph.endswith("(device)") and "logits" in each.output]
    return [(each.output, each.cosine, each.norm_ratio) for each in found]


def test_the_two_graphs_have_the_weights_of_one(half, made):
    whole = made("fp16", inner=None)
    parts = [weights(half, name) for name in ("decoder_low", "decoder_high")]
    assert not (set(parts[0]) & set(parts[1])) - {"rotary.inv_freq"}
    assert parts[0] | parts[1] == weights(whole, "decoder")


def weights(folder, graph):
    """The bytes of each weight."""
    model = onnx.load(folder / f"{graph}.onnx")
    return {tensor.name: tensor.raw_data for tensor in model.graph.initializer if len(tensor.raw_data) > 64}


def test_layers_keep_their_numbers(half):
    manifest = Bundle.load(half).manifest
    assert manifest.decoders == ("decoder_low", "decoder_high")
    low, high = (manifest.graphs[name] for name in manifest.decoders)
    assert [tensor.name for tensor in low.outputs] == [
        "rows", "share", "new_key.0", "new_value.0", "new_key.1", "new_value.1",
    ]  # fmt: skip
    assert [tensor.name for tensor in high.inputs] == [
        "rows", "positions", "rotary", "past_key.2", "past_value.2", "past_key.3", "past_value.3",
    ]  # fmt: skip
    assert [tensor.name for tensor in low.device.outputs] == [
        "rows", "share", "present_key.0", "present_value.0", "present_key.1", "present_value.1",
    ]  # fmt: skip
    names = [tensor.name for tensor in high.device.inputs if tensor.name not in high.device_weights]
    assert names == [
        "rows", "last_position", "rotary", "past_key.2", "past_value.2", "past_key.3", "past_value.3",
    ]  # fmt: skip


def test_the_share_is_that_of_the_last_row(half):
    """Over a cache of any length: it sums to 1, and nothing of it goes to what is not filled."""
    from tests.export.edits import session

    manifest, rng = Bundle.load(half).manifest, np.random.default_rng(0)
    past = {t.name: np.zeros((2, 9, 16), np.float16) for t in manifest.graphs["decoder_low"].inputs[2:]}
    feeds = {"embeddings": rng.normal(size=(3, 64)).astype(np.float16), "positions": np.arange(4, 7)}
    share = session(half / "decoder_low.onnx").run(["share"], {**feeds, **past})[0]
    assert share.shape == (12,)
    assert share.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(share[4:9], 0)


def test_the_operators_node_keeps_more_and_goes_by_the_nominal_threshold(half):
    manifest = Bundle.load(half).manifest
    assert (manifest.prune["retention_ratio"], manifest.params.decoder_share) == (1000, 0.75)
    node = op.node_attributes(manifest.params)
    assert (node["retention_ratio"], node["segment_threshold"]) == (1333, 6500)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--inner-layer", "2"), "--inner-layer is 2, the decoder has 2 layers"),
        (("--inner-ratio", "0.5"), "--inner-ratio is given without --inner-layer"),
        (("--inner-layer", "0"), "argument --inner-layer: '0' is not a positive integer"),
        (("--inner-layer", "1", "--inner-ratio", "0"), "argument --inner-ratio: '0' is not a number above 0"),
    ],
)
def test_what_cannot_be_is_refused(video_desk, arguments, error):
    assert error in video_desk.refused(*arguments)[0]


def test_half_stays_by_default(video_desk):
    assert video_desk.export("--inner-layer", "1") == 0
    assert Bundle.load("out").manifest.decoder.inner == InnerPruning(1, 0.5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["decoder"].pop("inner"), "graphs has no 'decoder'"),
        (lambda data: data["graphs"].pop("decoder_low"), "graphs has no 'decoder_low'"),
        (lambda data: data["decoder"]["inner"].update(layer=1), "do not fit the tensors of graphs: decoder_low"),
        (lambda data: data["decoder"]["inner"].update(layer=4), "decoder: inner is out of range"),
        (lambda data: data["decoder"]["inner"].update(ratio=1.5), "decoder: inner is out of range"),
        (lambda data: data["prompt"].update(vocabulary=5), "do not fit the tensors of graphs: decoder_high"),
    ],
)
def test_a_bundle_that_contradicts_itself_is_refused(half, tmp_path, edit, message):
    data = json.loads((half / "bundle.json").read_text())
    edit(data)
    (tmp_path / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(TangoError, match=message):
        Bundle.load(tmp_path)
