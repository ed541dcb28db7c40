"""A graph of a bundle, defined anew on the bundle's weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tango_calibration.quantization.replay import open_graph
from tango_calibration.quantization.stored import StoredGraph
from tango_export.graph import PORTABLE
from tango_export.graph.files import write_portable
from tango_plugins import TangoError
from tango_runtime.backends.ort_cpu import open_session
from tango_runtime.bundle import Bundle


@pytest.fixture(scope="module")
def stored(bundle):
    """``stored("decoder", precision=…)``."""
    return lambda name, precision="fp16": StoredGraph(Bundle.load(bundle(precision=precision)), name)


def decoder_feeds(stored):
    rng = np.random.default_rng(0)
    feeds = {"embeddings": rng.normal(size=(9, stored.spec.inputs[0].shape[1])), "positions": np.arange(9)}
    for tensor in stored.spec.inputs[2:]:
        feeds[tensor.name] = np.zeros((tensor.shape[0], 0, tensor.shape[2]))
    return {tensor.name: feeds[tensor.name].astype(tensor.dtype) for tensor in stored.spec.inputs}


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_it_runs_as_the_bundles_graph_from_the_bundles_file(stored, precision):
    found = stored("decoder", precision)
    feeds = decoder_feeds(found)
    expected = open_session(found.folder / found.spec.file).run(None, feeds)
    inputs = list(dict.fromkeys(layer.input for layer in found.linears))
    for a, b in zip(open_graph(found, more=inputs).run(feeds), expected, strict=False):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 1e-3), ("fp32", 0)])
def test_smoothing_of_all_weights_is_exact(stored, precision, tolerance, tmp_path):
    """But for what becomes smaller than a normal fp16 number."""
    found = stored("decoder", precision)
    rng = np.random.default_rng(0)
    factors = {layer.input: np.exp2(rng.integers(-3, 4, layer.fan_in)).astype(np.float32) for layer in found.linears}
    smoothing = {layer.name: factors[layer.input] for layer in found.linears if layer.gain}
    assert smoothing.keys() == {layer.name for layer in found.linears if not layer.name.endswith("o_proj")}
    spec = write_portable(found.build(PORTABLE), found.smoothed(smoothing), tmp_path, lambda done: None)
    assert (tmp_path / spec.data).read_bytes() != (found.folder / spec.data).read_bytes()
    feeds = decoder_feeds(found)
    for a, b in zip(open_session(tmp_path / spec.file).run(None, feeds), open_graph(found).run(feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("fp32", 1e-6)])
def test_smoothing_of_a_tower_of_any_frame_size(qwen_bundle, precision, tolerance, tmp_path):
    """Its second half has products in fp32, and the bias of up_proj shrinks with the weight."""
    found = StoredGraph(Bundle.load(qwen_bundle(precision=precision)), "vision")
    assert {layer.wide for layer in found.linears} == {True, False}
    rng = np.random.default_rng(0)
    factors = {layer.input: np.exp2(rng.integers(-1, 2, layer.fan_in)).astype(np.float32) for layer in found.linears}
    smoothing = {layer.name: factors[layer.input] for layer in found.linears if layer.gain}
    kinds = {name.split(".", 3)[-1] for name in smoothing}
    assert kinds == {"attn.qkv", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    spec = write_portable(found.build(PORTABLE), found.smoothed(smoothing), tmp_path, lambda done: None)
    feeds = {"frames": rng.integers(0, 255, (2, 2, 84, 140, 3), np.uint8)}
    for a, b in zip(open_session(tmp_path / spec.file).run(None, feeds), open_graph(found).run(feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def changed(bundle, **changes):
    found = Bundle.load(bundle())
    return replace(found, manifest=replace(found.manifest, **changes))


def test_what_does_not_fit_the_bundle_is_refused(bundle):
    config = Bundle.load(bundle()).manifest.config
    wider = {**config, "text": {**config["text"], "intermediate_size": 256}}
    with pytest.raises(TangoError, match="graphs: decoder is another graph than config defines"):
        StoredGraph(changed(bundle, config=wider), "decoder")
    other = {**config, "text": {**config["text"], "rope_theta": "10000"}}
    with pytest.raises(TangoError, match='config: text: rope_theta is "10000", not a finite number'):
        StoredGraph(changed(bundle, config=other), "decoder")
    with pytest.raises(TangoError, match="there is no model family 'llava-next'"):
        StoredGraph(changed(bundle, family="llava-next"), "decoder")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text", "num_hidden_layers", 2**31 - 1),
        ("vision", "num_hidden_layers", 2**31 - 1),
        ("vision", "image_size", 2**31 - 1),
        ("vision", "patch_size", 1),
        ("text", "rope_theta", 0.0),
        ("text", "num_attention_heads", 0),
    ],
)
def test_a_config_larger_than_any_model_is_refused_before_its_graphs_are_built(bundle, part, key, value):
    config = Bundle.load(bundle()).manifest.config
    hostile = {**config, part: {**config[part], key: value}}
    with pytest.raises(TangoError, match=rf"config.*{key}"):
        StoredGraph(changed(bundle, config=hostile), "decoder")


@pytest.mark.parametrize(
    ("part", "key"), [("vision", "depth"), ("vision", "window_size"), ("text", "num_hidden_layers")]
)
def test_a_config_of_qwen_larger_than_any_model_is_refused(qwen_bundle, part, key):
    config = Bundle.load(qwen_bundle()).manifest.config
    hostile = {**config, part: {**config[part], key: 2**31 - 1}}
    with pytest.raises(TangoError, match=f"config: {part}: {key} is 2147483647"):
        StoredGraph(changed(qwen_bundle, config=hostile), "decoder")
