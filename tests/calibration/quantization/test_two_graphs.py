"""A decoder with inner pruning is quantized as one: losses of the answer, one budget, two graphs."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from tango_calibration.quantization import replay, sensitivity
from tango_calibration.quantization.cache import ObservationCache
from tango_calibration.quantization.calibrate import CalibrationRequest, calibrate
from tango_calibration.quantization.capture import capture
from tango_calibration.quantization.clips import read_clips
from tango_calibration.quantization.sensitivity import BUDGETS
from tango_calibration.quantization.stored import StoredGraph
from tango_export.graph import PORTABLE
from tango_export.graph.operators import FP8_OPSET
from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Stream
from tango_runtime.backends.cuda.ort_fused import FusedOrtRunner
from tango_runtime.backends.registry import select
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main
from tango_runtime.pipeline.generate import PromptCache
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.sizing.models import find_model
from tests.fakes.cuda import install
from tests.gpu.runtime.thinned import logits

GRAPHS = ("decoder_low", "decoder_high")
QUESTION = "What happens in the video?"


@pytest.fixture(scope="module")
def folder(responsive_checkpoint):
    """``folder("fp16")``: four layers, half of the video from the third on."""
    return lambda dtype="fp16": responsive_checkpoint("llava-video", layers=4, inner=(2, 0.5), dtype=dtype)[1]


@pytest.fixture(scope="module")
def request_of(folder, tmp_path_factory):
    """``request_of("int8")``: its decoder in this precision; all tests share a cache."""
    root = tmp_path_factory.mktemp("calibrated")

    def made(decoder, name=None, **changes):
        wanted = CalibrationRequest(folder(), root / (name or decoder), "synthetic", vision="fp16", decoder=decoder)
        return replace(wanted, **{"videos": 4, "frames": 8, "max_new_tokens": 3, "cache": root / "cache", **changes})

    return made


@pytest.fixture(scope="module", params=["int8", pytest.param("int4", marks=pytest.mark.slow)])
def made(request, request_of):
    """(request, outcome)."""
    wanted = request_of(request.param)
    return wanted, calibrate(wanted)


@pytest.fixture(scope="module")
def captured(folder):
    """An fp32 bundle, and what its decoder took."""
    bundle = Bundle.load(folder("fp32"))
    return bundle, capture(bundle, select(bundle, "ort-cpu"), Prompt.of(bundle), read_clips("synthetic", 4, 8)[0], 4)


@pytest.mark.parametrize("chunk", [256, 20])
def test_a_replay_thins_between_the_graphs_as_the_pipeline_does(captured, monkeypatch, chunk):
    """Logits of the prompt and of each token of the answer, with the activations of every layer beside them."""
    monkeypatch.setattr(replay, "CHUNK_TOKENS", chunk)
    bundle, found = captured
    taken, backend = found.decoder_input, select(bundle, "ort-cpu")
    sizes = (taken.thinning.rows, taken.thinning.kept)
    assert sizes[1] == round(sizes[0] / 2) > 0
    sessions, inputs = {}, {}
    for name in GRAPHS:
        stored = StoredGraph(bundle, name)
        inputs[name] = list(dict.fromkeys(layer.input for layer in stored.linears))
        sessions[name] = replay.open_graph(stored, more=inputs[name])
    passes = list(replay.run_decoder(sessions, bundle.manifest.graphs, taken))
    assert all(len(outputs) == 1 + len(inputs[name]) for name, outputs in passes)
    rows = {name: sum(len(outputs[1]) for graph, outputs in passes if graph == name) for name in GRAPHS}
    answer = len(taken.answer)
    assert rows == {
        "decoder_low": len(taken.prompt) + answer,
        "decoder_high": len(taken.prompt) - sizes[0] + sizes[1] + answer,
    }
    prompt = [taken.prompt]
    with closing(PromptCache(backend, prompt, [], len(taken.prompt), 2048, taken.thinning)) as cache:
        wanted = [np.array(cache.logits([]))]
        for row in taken.answer:
            wanted.append(np.array(backend.extend(cache._cache, [row[None]])))
    logits = [outputs[0] for name, outputs in passes if name == "decoder_high"][-1 - answer :]
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_a_capture_that_was_kept_is_the_same(captured, tmp_path):
    bundle, found = captured
    clip = read_clips("synthetic", 4, 8)[0]
    for make in (lambda: found, None):
        kept = ObservationCache(tmp_path, bundle, 4).capture(clip, make)
        assert kept.decoder_input.thinning == found.decoder_input.thinning
        np.testing.assert_array_equal(kept.decoder_input.prompt, found.decoder_input.prompt)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graphs_are_valid_at_the_opset_of_fp8(folder, name):
    stored = StoredGraph(Bundle.load(folder()), name)
    replay.open_graph(stored, replace(PORTABLE, opsets={"": FP8_OPSET}))


def test_both_graphs_are_quantized_with_one_budget(made):
    request, outcome = made
    old, new = Bundle.load(request.bundle), Bundle.load(request.output, verify=True)
    (part,) = outcome.graphs.values()
    names = [layer.layer for layer in part.layers]
    assert names[0] == "layers.0.self_attn.qkv_proj"
    assert names[-1] == "lm_head"
    assert len(names) == len(set(names)) == 4 * 5 + 1
    assert 0 < part.loss < 3 * BUDGETS["decoder"]
    excluded = []
    for name in GRAPHS:
        spec, before = new.manifest.graphs[name], old.manifest.graphs[name]
        assert (spec.inputs, spec.outputs, spec.runtimes) == (before.inputs, before.outputs, ("onnxruntime",))
        assert (spec.quantization.precision, spec.quantization.clips) == (request.decoder, 4)
        assert {weight for weight, stored in spec.weights.items() if stored.quantization} <= spec.device_weights.keys()
        excluded += spec.quantization.excluded
    assert excluded == [layer.layer for layer in part.excluded]
    assert new.manifest.graphs["vision"] == old.manifest.graphs["vision"]
    sizes = [sum(bundle.manifest.files[f"{name}.onnx.data"].size for name in GRAPHS) for bundle in (old, new)]
    assert part.bytes_after - part.bytes_before < sizes[1] - sizes[0] + 1e5 < 0


def test_both_forms_of_the_new_graphs_compute_what_the_old_ones_did(made, monkeypatch):
    """Of a prompt that is thinned to as many rows as it has: rounding would choose others."""
    request, _ = made
    install(monkeypatch)
    llm, stream = VideoLLM(request.output, "ort-cpu"), Stream()
    graphs = FusedOrtRunner(onnxruntime, llm.bundle, stream, ("CPUExecutionProvider", "cpu"))
    assert graphs.in_place
    llm._backend = CudaBackend(llm.bundle, graphs, stream)
    old, new = (VideoLLM(folder, "ort-cpu") for folder in (request.bundle, request.output))
    before, portable, device = (logits(each, 40, 40) for each in (old, new, llm))
    for after in (portable, device):
        distance = np.linalg.norm(after - before) / np.linalg.norm(before)
        print(f"distance {distance:.3f}")
        assert 0 < distance < 0.5


def test_the_commands_take_it(made, clip, capsys):
    request, _ = made
    assert main(["run", str(request.output), str(clip), QUESTION, "--max-new-tokens", "3"]) == 0
    assert main(["inspect", str(request.output), "--verify"]) == 0
    assert request.decoder in capsys.readouterr().out
    with pytest.raises(TangoError, match=f"decoder of .* is already quantized to {request.decoder}"):
        calibrate(replace(request, bundle=request.output, output=request.output.with_name("twice")))


@pytest.mark.parametrize("changed", GRAPHS)
def test_a_graph_whose_layers_all_lose_too_much_stays(request_of, monkeypatch, changed):
    (kept,) = set(GRAPHS) - {changed}
    layers = ("layers.0.", "layers.1.") if kept == "decoder_low" else ("layers.2.", "layers.3.", "norm")
    monkeypatch.setattr(
        sensitivity, "layers_to_exclude", lambda losses, *sizes: {name for name in losses if name.startswith(layers)}
    )
    request = request_of("int8", f"{changed}-only")
    calibrate(request)
    old, new = (Bundle.load(folder, verify=True).manifest for folder in (request.bundle, request.output))
    assert new.graphs[kept] == old.graphs[kept]
    assert new.graphs[changed].quantization.excluded == ()
    assert find_model(str(request.output)).decoder_precision == "int8"


@pytest.mark.slow
def test_its_accuracy_is_compared(request_of, capsys):
    request = request_of("int8", "compared")
    sizes = [
        "--videos",
        "4",
        "--frames",
        "8",
        "--max-new-tokens",
        "3",
        "--cache",
        str(request.cache),
        "--evaluate",
        "2",
    ]
    asked = ["calibrate", str(request.bundle), "--output", str(request.output), "--clips", "synthetic"]
    assert main([*asked, "--vision", "fp16", "--decoder", "int8", *sizes]) == 0
    told = capsys.readouterr().out
    assert "| decoder |      int8 |     21 |" in told
    assert "## Accuracy" in told
