"""`tango bench --compare-torch`: transformers on the same shapes."""

from __future__ import annotations

import json

import pytest
import torch

import tango_runtime.bench.peer
from tango_plugins import TangoError
from tango_runtime.bench.measure import Case, Setting, make_clip
from tango_runtime.bench.peer import Peer, Shape
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main

SETTING = Setting(decode_tokens=5, warm_up=1, repeats=2)
SHAPE = Shape(make_clip(Case(True, 160, 90), 4, 0), (112, 112), kept=8, prompt_tokens=39)


@pytest.fixture
def peer(responsive_checkpoint):
    llava, bundle = responsive_checkpoint()
    return Peer(str(llava), Bundle.load(bundle).manifest, SETTING, gpu=False)


def test_the_peer_is_measured_in_the_same_run(tiny_bundle, tmp_path, capsys):
    file = tmp_path / "out.json"
    quick = ["--warm-up", "1", "--repeats", "2", "--decode-tokens", "3", "--backend", "ort-cpu"]
    assert main(["bench", str(tiny_bundle), *quick, "--compare-torch", "--json", str(file)]) == 0
    assert "transformers p50" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["conditions"]["peer"].endswith("random weights of the shapes of llava")
    for case in found["cases"]:
        ours, theirs = (case["milliseconds"][system] for system in ("tango", "transformers"))
        assert set(ours) - {"prune", "second question", "first token, new length"} == set(theirs) - {"upload"}
        assert ours["decode"]["count"] == theirs["decode"]["count"] == 6


def test_the_prompt_has_the_requested_shape(peer, monkeypatch):
    seen = []
    forward = peer._model.forward
    monkeypatch.setattr(peer._model, "forward", lambda **given: (seen.append(given), forward(**given))[1])
    samples = peer.systems["transformers"](SHAPE, lambda done: None)
    assert seen[0]["inputs_embeds"].shape[:2] == (1, 39)
    assert [given["input_ids"].shape for given in seen[1:6]] == [(1, 1)] * 5
    assert len(seen) == 3 * 6
    assert seen[0]["past_key_values"].get_seq_length() == 39 + 5
    assert {name: len(values) for name, values in samples.items()} == {
        **dict.fromkeys(("video", "upload", "vision", "prefill", "first token", "answer"), 2),
        "decode": 10,
    }


def test_qwen_of_transformers_takes_the_same_grids(qwen_bundle, qwen_checkpoint, tmp_path):
    options, file = {"layers": 2}, tmp_path / "out.json"
    bundle, checkpoint = qwen_bundle(**options), qwen_checkpoint(**options)
    quick = ["--frames", "4", "--warm-up", "1", "--repeats", "1", "--decode-tokens", "2", "--backend", "ort-cpu"]
    quick += ["--source-size", "168x84", "--no-prune", "--compare-torch", str(checkpoint), "--json", str(file)]
    assert main(["bench", str(bundle), *quick]) == 0
    (case,) = json.loads(file.read_text())["cases"]
    assert not case["not_measured"]
    assert {"vision", "prefill", "decode"} <= case["milliseconds"]["transformers"].keys()


def test_a_captured_step_continues_the_prompt_in_the_cache(peer, monkeypatch):
    caches = []
    made = tango_runtime.bench.peer.transformers.StaticCache
    monkeypatch.setattr(
        tango_runtime.bench.peer.transformers,
        "StaticCache",
        lambda **given: (caches.append(made(**given)), caches[-1])[1],
    )
    monkeypatch.setattr(peer, "_recorded", lambda step: [step() for _ in range(4)] and step)  # as a capture does
    samples = peer._graph(SHAPE, lambda done: None)
    assert len(samples["decode"]) == 10
    assert caches[0].get_seq_length() == 39 + 5


def test_measurements_are_kept_if_transformers_fails(tiny_bundle, tmp_path, capsys):
    file = tmp_path / "out.json"
    quick = ["--warm-up", "1", "--repeats", "1", "--only-pruned", "--backend", "ort-cpu"]
    assert main(["bench", str(tiny_bundle), *quick, "--compare-torch", str(tmp_path), "--json", str(file)]) == 0
    (case,) = json.loads(file.read_text())["cases"]
    assert list(case["milliseconds"]) == ["tango"]
    assert "finds no configuration" in case["not_measured"]["transformers"]["error"]
    assert "transformers, pruned, 112x112: not measured" in capsys.readouterr().err


def test_torch_without_memory_is_an_error(peer, monkeypatch):
    def full(**given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand so on")

    monkeypatch.setattr(peer._model, "forward", full)
    with pytest.raises(TangoError, match=r"transformers failed: CUDA out of memory\. Tried to allocate 9 GiB \("):
        peer.systems["transformers"](SHAPE, lambda done: None)


def test_checkpoints_of_other_models_are_rejected(responsive_checkpoint, tmp_path):
    llava, bundle = responsive_checkpoint()
    manifest = Bundle.load(bundle).manifest
    with pytest.raises(TangoError, match="transformers finds no configuration in"):
        Peer(str(tmp_path), manifest, SETTING, gpu=False)
    config = json.loads((llava / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TangoError, match="has other shapes than the bundle"):
        Peer(str(tmp_path), manifest, SETTING, gpu=False)
    with pytest.raises(TangoError, match="cannot use the GPU"):
        Peer(str(llava), manifest, SETTING, gpu=True)
