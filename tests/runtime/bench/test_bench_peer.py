"""`tango bench --compare-torch`: transformers on the same shapes."""

from __future__ import annotations

import json
from functools import partial

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


@pytest.fixture
def qwen_peer(qwen_bundle, qwen_checkpoint):
    options = {"layers": 2, "outliers": False}
    bundle, checkpoint = qwen_bundle(precision="fp32", **options), qwen_checkpoint(**options)
    return Peer(str(checkpoint), Bundle.load(bundle).manifest, SETTING, gpu=False, compiles=True)


#: 5×6 tokens a pair of frames, in windows of 4×4, 4×2, 1×4 and 1×2.
QWEN_SHAPE = Shape(make_clip(Case(True, 180, 150), 4, 0), (140, 168), kept=20, prompt_tokens=39)


def stages_of(peer, system, shape, monkeypatch):
    """The encoder and the prefill that a system measures."""
    seen = []
    with monkeypatch.context() as context:
        context.setattr(
            peer, "_answers", lambda shape, done, encode, prefill, decode_tokens: seen.extend((encode, prefill))
        )
        system(shape, lambda done: None)
    return seen


@torch.inference_mode()
def results_of(peer, shape, encode, prefill):
    """Features, the first token, and keys and values of all layers."""
    frames = torch.from_numpy(shape.frames())
    features, cache = encode(frames), peer._new_cache()
    token = peer._prefill(features, shape, cache, prefill)
    return features, token, *(kept for layer in cache.layers for kept in (layer.keys, layer.values))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_compiled_stages_compute_the_same(name, peer, qwen_peer, monkeypatch):
    peer, shape = {"llava": (peer, SHAPE), "qwen": (qwen_peer, QWEN_SHAPE)}[name]
    eager = results_of(peer, shape, peer._encode, peer._next)
    compiled = results_of(peer, shape, *stages_of(peer, peer._compiled, shape, monkeypatch))
    assert len(eager) == 2 + 2 * 2
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert [found["part"] for found in peer.compilations] == ["vision tower", "prefill"]
    assert peer.compilations[1]["graph_breaks"] == 0


def test_the_compiled_peer_is_measured_up_to_the_first_token(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # no C++ compiler
    file = tmp_path / "out.json"
    quick = ["--warm-up", "1", "--repeats", "2", "--decode-tokens", "1", "--backend", "ort-cpu"]
    options = ["--compare-torch", "--torch-compile", "--json", str(file)]
    assert main(["bench", str(tiny_bundle), *quick, *options]) == 0
    found = json.loads(file.read_text())
    for case in found["cases"]:
        assert not case["not_measured"]
        eager, compiled = (case["milliseconds"][system] for system in ("transformers", "compiled"))
        assert set(compiled) == set(eager) - {"decode", "answer"}
        assert compiled["vision"]["count"] == 2
    parts = found["conditions"]["torch_compile"]
    assert [part["part"] for part in parts] == ["vision tower", "prefill"] * 2  # pruned, unpruned
    assert all(part["system"] == "compiled" and part["seconds"] > 0 and part["graphs"] for part in parts)
    assert parts[1]["prompt_tokens"] < parts[3]["prompt_tokens"]
    printed = capsys.readouterr()
    assert "compiled p50" in printed.out
    assert "compiled: prefill compiled before measuring, in " in printed.err


@pytest.mark.parametrize(("part", "failing"), [("vision tower", 0), ("prefill", 1)])
def test_the_part_that_cannot_be_compiled_is_named(part, failing, peer, monkeypatch):
    def broken(graph, inputs):
        raise NotImplementedError("no such kernel\nand so on")

    compiled, compiler = [], torch.compile

    def compile_(stage, **options):
        compiled.append(stage)
        return compiler(stage, backend=broken if len(compiled) == 1 + failing else "eager", **options)

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(TangoError, match=rf"torch.compile of the {part} failed: .*no such kernel \(") as raised:
        peer._compiled(SHAPE, lambda done: None)
    assert "drop --torch-compile" in raised.value.hint


def test_windows_in_one_call_compute_the_same(qwen_peer, monkeypatch):
    calls = []

    def by_window(query, key, value, starts, key_starts, longest, key_longest):
        """Of packed sequences [S, H, head_dim], as PyTorch defines it."""
        sizes = starts.diff().tolist()
        assert (max(sizes), key_longest, key_starts) == (longest, longest, starts)
        calls.append(len(sizes))
        split = zip(*(tensor.transpose(0, 1).split(sizes, dim=1) for tensor in (query, key, value)), strict=True)
        return torch.cat([torch.nn.functional.scaled_dot_product_attention(*one) for one in split], 1).transpose(0, 1)

    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch is older than 2.10")
    monkeypatch.setattr(varlen, "varlen_attn", by_window)
    monkeypatch.setattr(torch, "compile", lambda stage, **options: stage)
    eager = results_of(qwen_peer, QWEN_SHAPE, qwen_peer._encode, qwen_peer._next)[0]
    seen = []

    def answers(shape, done, encode, prefill, decode_tokens):
        seen.append(results_of(qwen_peer, shape, encode, prefill)[0])

    monkeypatch.setattr(qwen_peer, "_answers", answers)
    qwen_peer._varlen(QWEN_SHAPE, lambda done: None)
    torch.testing.assert_close(seen[0], eager)
    assert set(calls) == {2 * 4, 2}  # windows, and whole pairs of frames
    assert [found["system"] for found in qwen_peer.compilations] == ["compiled, varlen"] * 2
    called = len(calls)
    qwen_peer._encode(torch.from_numpy(QWEN_SHAPE.frames()))
    assert len(calls) == called  # other systems keep their attention


def test_compiling_needs_a_peer(tiny_bundle, capsys):
    assert main(["bench", str(tiny_bundle), "--torch-compile"]) == 2
    assert "hint: add --compare-torch" in capsys.readouterr().err
