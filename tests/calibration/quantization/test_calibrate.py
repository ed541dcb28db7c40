"""A bundle becomes a quantized bundle, or there is no output."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tango_calibration.quantization import observe, replay, sensitivity
from tango_calibration.quantization.calibrate import CalibrationRequest, calibrate
from tango_calibration.quantization.clips import read_clips
from tango_calibration.quantization.sensitivity import BUDGETS, divergence, layers_to_exclude, noise
from tango_plugins import TangoError
from tango_runtime.bundle import MANIFEST, Bundle
from tango_runtime.cli.main import main
from tango_runtime.pipeline.video_llm import VideoLLM


@pytest.fixture(scope="module")
def request_of(bundle, tmp_path_factory):
    """``request_of(name, **changes)``: a request; all tests share a cache."""
    folder = tmp_path_factory.mktemp("calibrated")

    def made(name, **changes):
        made = CalibrationRequest(bundle(), folder / name, "synthetic", videos=4, frames=8, max_new_tokens=3)
        return replace(made, **{"cache": folder / "cache", **changes})

    return made


@pytest.fixture(scope="module")
def made(request_of):
    """(request, outcome) of a bundle with 8-bit vision and a 4-bit decoder."""
    request = request_of("int8-int4", decoder="int4")
    return request, calibrate(request)


def test_the_new_bundle_is_complete_and_smaller(made):
    request, outcome = made
    old, new = Bundle.load(request.bundle), Bundle.load(request.output, verify=True)
    vision, decoder = (new.manifest.graphs[name] for name in ("vision", "decoder"))
    assert (vision.quantization.precision, vision.quantization.clips) == ("int8", 4)
    assert (decoder.quantization.precision, decoder.quantization.clips) == ("int4", 4)
    assert vision.runtimes == decoder.runtimes == ("onnxruntime",)
    assert vision.opset == decoder.opset == 17
    for name in ("vision", "decoder"):
        spec = new.manifest.graphs[name]
        quantized = {weight for weight, stored in spec.weights.items() if stored.quantization}
        assert quantized
        assert quantized <= spec.device_weights.keys()  # both forms read the same bytes
        assert len(quantized) == len(outcome.graphs[name].layers) - sum(
            layer.format is None for layer in outcome.graphs[name].layers
        )
    assert new.manifest.graphs["embed"] == old.manifest.graphs["embed"]
    assert old.manifest.graphs["decoder"].weights
    unchanged = ("embed.onnx", "embed.device.onnx", "embed.onnx.data", "prune.onnx", "tokenizer.json")
    assert all(new.manifest.files[name] == old.manifest.files[name] for name in unchanged)
    assert sorted(path.name for path in new.path.iterdir()) == sorted([*new.manifest.files, MANIFEST])
    assert outcome.graphs["decoder"].bytes_after < 0.5 * outcome.graphs["decoder"].bytes_before


def test_inputs_are_scaled_where_a_layer_loses_less_so(made):
    """Of a decoder with outliers that is some of those that follow a norm or a gate; what one input feeds agrees."""
    layers = {layer.layer: layer.scaled for layer in made[1].graphs["decoder"].layers}
    assert any(layers.values())
    assert not any(scaled for name, scaled in layers.items() if name.endswith("o_proj"))  # its input has no gain
    for layer in (0, 1):
        assert layers[f"layers.{layer}.mlp.gate_proj"] == layers[f"layers.{layer}.mlp.up_proj"]


def test_the_new_bundle_answers(made):
    request, _ = made
    clip = read_clips("synthetic", 4, 8)[0]
    for bundle in (request.bundle, request.output):
        answer = VideoLLM(bundle, "ort-cpu").generate(clip.source, "What?", frames=8, max_new_tokens=3)
        assert answer.kept > 0
        assert answer.text or answer.ids


def test_the_outcome_has_losses_and_overlaps(made):
    request, outcome = made
    for name, graph in outcome.graphs.items():
        quantization = Bundle.load(request.output).manifest.graphs[name].quantization
        assert quantization.excluded == tuple(layer.layer for layer in graph.excluded)
        assert 0 < graph.loss < 3 * BUDGETS[name]
        assert all(layer.loss >= 0 for layer in graph.layers)
    assert len(outcome.overlaps) == 4
    assert all(0 < o.kept <= 1 and 0 < o.salient <= 1 for o in outcome.overlaps)


def test_nothing_is_measured_twice(made, request_of, monkeypatch):
    _, outcome = made
    monkeypatch.setattr(observe, "capture", None)
    sessions = opened(monkeypatch)
    assert calibrate(request_of("again", decoder="int4")) == outcome
    # Each new graph is compared with its original at the end, and the kept tokens once.
    assert len(sessions) == 2 * 2 + 1


def opened(monkeypatch, interrupt_at=None):
    """A list that grows by one for each session; one of them can be interrupted."""
    sessions, original = [], replay.Session.__init__

    def opens(*args, **options):
        sessions.append(1)
        if len(sessions) == interrupt_at:
            raise KeyboardInterrupt
        original(*args, **options)

    monkeypatch.setattr(replay.Session, "__init__", opens)
    return sessions


def test_an_interrupted_calibration_resumes(request_of, monkeypatch, tmp_path):
    sessions = opened(monkeypatch, interrupt_at=2 + 4)  # after statistics and the original, the fourth pair of layers
    request = request_of("later", vision="fp16", decoder="int8", cache=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        calibrate(request)
    assert not list(request.output.parent.glob("*later*"))
    sessions[:] = [1] * 100
    layers = calibrate(request).graphs["decoder"].layers
    pairs = -(-len(layers) // 2)
    assert len(sessions) - 100 == 1 + pairs - 3 + 1  # the original, the other layers and the new


def test_all_layers_in_the_first_format(request_of, made, monkeypatch):
    monkeypatch.setattr(sensitivity, "OUTLIER_FACTOR", 1e9)
    monkeypatch.setitem(sensitivity.BUDGETS, "decoder", 1e9)
    assert calibrate(request_of("int4", vision="fp16", decoder="int4")).graphs["decoder"].excluded == ()


def test_without_a_search_every_layer_is_quantized(request_of, made, monkeypatch):
    monkeypatch.setattr(sensitivity.PartQuantizer, "_loss", None)
    request = request_of("nearest", decoder="int8", search=False)
    outcome = calibrate(request)
    for name, graph in outcome.graphs.items():
        quantization = Bundle.load(request.output).manifest.graphs[name].quantization
        assert (quantization.clips, quantization.excluded) == (4, ())
        assert math.isnan(graph.loss)
        assert {layer.format for layer in graph.layers} == {"w8a8"}
    assert 0 < np.mean([overlap.kept for overlap in outcome.overlaps]) <= 1


def test_4_bits_without_a_search_need_no_clips(request_of, capsys, monkeypatch):
    request = request_of("no-clips", vision="fp16", decoder="int4", clips=None, search=False)
    monkeypatch.setattr(replay, "Session", None)  # nothing runs
    options = ("--no-search", "--vision=fp16", "--decoder=int4", f"--output={request.output}", "--backend=ort-cpu")
    assert main(["calibrate", str(request.bundle), *options]) == 0
    assert "not measured" in capsys.readouterr().out
    decoder = Bundle.load(request.output, verify=True).manifest.graphs["decoder"]
    assert (decoder.quantization.clips, decoder.quantization.excluded) == (0, ())
    old = Bundle.load(request.bundle).manifest.graphs["decoder"]
    weight = next(name for name in decoder.weights if name.startswith("lm_head") and name.endswith(".int4"))
    values, scales = (stored(request.output, decoder, name) for name in (weight, f"{weight[:-5]}.scale"))
    exact = stored(request.bundle, old, weight[:-5]).astype(np.float32).T
    nibbles = np.stack((values & 15, values >> 4), -1).reshape(*scales.shape, -1)
    rounded = ((nibbles - 8.0) * scales[..., None]).reshape(len(scales), -1)[:, : exact.shape[1]]
    steps = np.abs(scales).astype(np.float32).max(1, keepdims=True)
    assert (np.abs(rounded - exact) <= 1.2 * steps).all()


def stored(folder, spec, name):
    """A weight of a graph, as its bundle stores it."""
    place = spec.weights[name]
    return np.memmap(folder / spec.data, place.dtype, "r", place.offset, place.shape)


def test_smoothed_8_bit_decoder(request_of):
    request = request_of("int8", vision="fp16", decoder="int8")
    outcome = calibrate(request)
    spec = Bundle.load(request.output, verify=True).manifest.graphs["decoder"]
    assert spec.quantization.precision == "int8"
    assert spec.runtimes == ("onnxruntime",)
    assert outcome.graphs["decoder"].loss < 2 * BUDGETS["decoder"]
    assert outcome.overlaps == ()  # vision is not quantized


def test_8_bits_for_tensorrt(request_of, made):
    request = request_of("int8-tensorrt", runtime="tensorrt")
    outcome = calibrate(request)
    spec = Bundle.load(request.output, verify=True).manifest.graphs["vision"]
    assert (spec.runtimes, spec.opset, spec.device) == (("onnxruntime", "tensorrt"), 17, None)
    assert outcome.overlaps == made[1].overlaps  # the same numbers in another form
    assert outcome.graphs["vision"].bytes_after > made[1].graphs["vision"].bytes_after


@pytest.fixture(scope="module")
def wide_bundle(bundle):
    """With a tower whose widths FP8 takes."""
    return bundle(vision_width=96, vision_intermediate=192)


def test_fp8(request_of, wide_bundle):
    """Both graphs run on TensorRT as they are, and on ONNX Runtime in the device form, on the same weights."""
    request = request_of("fp8", vision="fp8", decoder="fp8", bundle=wide_bundle)
    outcome = calibrate(request)
    graphs = Bundle.load(request.output, verify=True).manifest.graphs
    for name in ("vision", "decoder"):
        spec, graph = graphs[name], outcome.graphs[name]
        assert (spec.runtimes, spec.opset, spec.quantization.precision) == (("tensorrt",), 19, "fp8")
        assert (spec.device.runtimes, spec.device.opset) == (("onnxruntime",), 19)
        stored = {name for name, weight in spec.weights.items() if weight.dtype == "float8_e4m3fn"}
        assert stored
        assert stored == {tensor.name for tensor in spec.device.inputs if tensor.dtype == "float8_e4m3fn"}
        assert 0 < graph.loss < 3 * BUDGETS[name]
        assert graph.bytes_after < 0.8 * graph.bytes_before
    # The patches have 588 values, and FP8 takes multiples of 16.
    assert "tower.embeddings.patch_embedding" in graphs["vision"].quantization.excluded
    assert graphs["embed"].opset == 17
    assert all(0 < overlap.kept <= 1 for overlap in outcome.overlaps)


def test_fp8_for_tensorrt_has_no_device_graph(request_of, wide_bundle):
    request = request_of("fp8-tensorrt", vision="fp8", runtime="tensorrt", bundle=wide_bundle)
    calibrate(request)
    assert Bundle.load(request.output, verify=True).manifest.graphs["vision"].device is None


def test_more_layers_are_excluded_until_enough_tokens_are_the_same(request_of, made):
    before = made[1]
    least = (1 + np.mean([o.kept for o in before.overlaps])) / 2
    outcome = calibrate(request_of("overlap", min_overlap=least))
    assert np.mean([o.kept for o in outcome.overlaps]) >= least
    excluded = [{layer.layer for layer in o.graphs["vision"].excluded} for o in (before, outcome)]
    assert excluded[0] < excluded[1]
    with pytest.raises(TangoError, match="most layers excluded"):
        calibrate(request_of("all", min_overlap=1.01))


def test_a_fp32_bundle(bundle, request_of):
    request = request_of("fp32", bundle=bundle(precision="fp32"), decoder="int4", cache=None)
    calibrate(request)
    manifest = Bundle.load(request.output, verify=True).manifest
    assert manifest.dtype == "float32"
    assert not any(spec.device for spec in manifest.graphs.values())
    assert (request.output.parent / "fp32.observed").is_dir()


# Choice of layers


def test_the_worst_layers_are_excluded_until_the_rest_is_within_the_budget():
    losses = {"a": 0.5, "b": 0.3, "c": 0.2, "d": 0.1}
    sizes = dict.fromkeys(losses, 100)
    assert layers_to_exclude(losses, sizes, 2) == set()
    assert layers_to_exclude(losses, sizes, 0.35) == {"a", "b"}
    assert layers_to_exclude(losses, sizes, 0) == set(losses)


def test_small_outliers_are_excluded():
    losses = {"small": 50.0, "large": 60.0} | {str(i): 1.0 for i in range(10)}
    sizes = {"small": 10, "large": 400} | {str(i): 100 for i in range(10)}
    assert layers_to_exclude(losses, sizes, 1e9) == {"small"}


def test_losses():
    a, b = np.array([3.0, 4.0]), np.array([3.0, 3.0])
    assert noise([a, a], [a, b]) == pytest.approx(1 / 25)
    assert divergence([a], [a + 7]) == pytest.approx(0)  # a shift of all logits changes nothing
    p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
    assert divergence([a, a], [a, b]) == pytest.approx((p * np.log(p / q)).sum() / 2)


# Errors


def rejected(request, match):
    before = sorted(request.output.parent.iterdir())
    with pytest.raises(TangoError, match=match):
        calibrate(request)
    assert sorted(request.output.parent.iterdir()) == before


def test_invalid_requests(made, bundle, request_of, tmp_path):
    request, _ = made
    rejected(request_of("x", vision="fp16"), "nothing to quantize")
    rejected(request_of("x", vision="int4"), "vision cannot be quantized to int4")
    rejected(request_of("x", bundle=request.output), "vision of .* already quantized to int8")
    rejected(request_of("x", decoder="int4", runtime="tensorrt"), "tensorrt cannot run decoder in int4")
    rejected(request_of("x", decoder="int4", runtime="tensorrt"), "tensorrt cannot run decoder in int4")
    narrow = bundle(vision_width=60)  # heads of 20, which no kernel takes
    rejected(request_of("x", vision="fp8", bundle=narrow), "vision of .* has none")
    rejected(request_of("x", vision="fp8", bundle=bundle(precision="fp32")), "fp8 needs an fp16 bundle")
    rejected(request_of("x", vision="fp16", decoder="int8", min_overlap=0.9), "--min-overlap is about vision")
    rejected(request_of("x", clips=None), "no clips to measure")
    rejected(request_of("x", vision="fp16", decoder="int4", search=False), "--no-search measures no clips")
    rejected(request_of("x", search=False, min_overlap=0.9), "mutually exclusive")
    rejected(request_of("int8-int4"), "already exists")
    rejected(request_of("x", clips=str(tmp_path)), "no clips")
    rejected(request_of("x", videos=3), "3 of the 4 clips")
    rejected(request_of("x", bundle=tmp_path), "bundle.json")


def test_a_clip_that_does_not_decode(request_of, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.mp4").write_bytes(b"not a video")
    rejected(request_of("x", clips=str(tmp_path)), "clip 0.mp4")


def test_a_loss_that_is_no_number(request_of, monkeypatch, tmp_path):
    """ONNX Runtime 1.22 gives NaN for 4-bit products of fp16."""
    monkeypatch.setattr(sensitivity, "divergence", lambda original, quantized: float("nan"))
    request = request_of("x", vision="fp16", decoder="int4", cache=tmp_path)
    rejected(request, "decoder in int4 gives no finite numbers on ONNX Runtime")


def test_only_quantized_graphs_have_a_quantization(made):
    request, _ = made
    graphs = json.loads((request.output / MANIFEST).read_text())["graphs"]
    assert {name for name, graph in graphs.items() if "quantization" in graph} == {"vision", "decoder"}
    assert "quantization" not in (request.bundle / MANIFEST).read_text()


# The command


def run(request, *more):
    arguments = ["calibrate", str(request.bundle), "--output", str(request.output), "--clips", "synthetic"]
    sizes = ["--videos", "4", "--frames", "8", "--max-new-tokens", "3", "--cache", str(request.cache)]
    return main([*arguments, *sizes, *more])


def test_the_command_prints_tables_and_checks_the_drop(request_of, capsys, tmp_path):
    request = request_of("command")
    asked = ["--evaluate", "6", "--report-dir", str(tmp_path / "report")]
    assert run(request, *asked, "--max-drop", "-101") == 1
    printed = capsys.readouterr().out
    assert "## Accuracy" in printed
    assert "tango 0.1" in printed
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "calibration.json",
        "calibration.md",
        "layers.png",
    ]
    report = json.loads((tmp_path / "report" / "calibration.json").read_text())
    assert report["accuracy"][0]["questions"] == 6
    assert run(request, *asked, "--max-drop", "101", "--overwrite") == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--decoder", "fp8", "--evaluate", "5"], "runs fp8 on a GPU only"),
        (["--min-overlap", "0"], "argument --min-overlap: '0' is not a percentage"),
        (["--max-drop", "1"], "--evaluate"),
        (["--no-search", "--report-dir", "x"], "--report-dir is about losses"),
        (["--evaluate", "0"], "argument --evaluate: '0' is not a positive integer"),
    ],
)
def test_the_command_rejects_invalid_arguments(request_of, capsys, more, message):
    assert run(request_of("refused"), *more) == 2
    assert message in capsys.readouterr().err
    assert not request_of("refused").output.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "{bundle}", "--overwrite"], "--output .* would replace the bundle"),
        (["--output", "{clips}", "--overwrite"], "--output .* would replace --clips"),
        (["--output", "{clips}/..", "--overwrite"], "--output .* would replace"),
        (["--output", "{new}", "--cache", "{new}/cache"], "--output .* would replace --cache"),
        (["--output", "{new}", "--report-dir", "{new}"], "--output .* would replace --report-dir"),
        (["--output", "{new}", "--report-dir", "{bundle}"], "--report-dir .* would replace the bundle"),
    ],
)
def test_outputs_that_would_replace_something_are_refused(request_of, capsys, tmp_path, more, message):
    folder = shutil.copytree(request_of("refused").bundle, tmp_path / "bundle")
    clips = tmp_path / "clips"
    clips.mkdir()
    places = {"bundle": folder, "clips": clips, "new": tmp_path / "new"}
    arguments = [text.format(**places) for text in ["calibrate", "{bundle}", "--clips", "{clips}", *more]]
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_gpu_that_is_not_there_is_an_error_before_any_output(request_of, tmp_path):
    request = request_of("on-a-gpu", backend="ort-cuda", cache=tmp_path)
    with pytest.raises(TangoError, match="CUDA"):
        calibrate(request)
    assert not request.output.exists()


@pytest.mark.parametrize(("asked", "found"), [("auto", "ort-cpu"), ("ort-cpu", "ort-cpu"), ("ort-cuda", "ort-cuda")])
def test_the_backend_of_a_machine_without_a_gpu(asked, found, monkeypatch):
    def missing():
        raise TangoError("there is no GPU", "")

    monkeypatch.setattr(replay, "open_stream", missing)
    assert replay.usable(asked) == found


def test_calibration_does_not_run_on_engines():
    with pytest.raises(TangoError, match="calibration does not run on tensorrt"):
        replay.usable("tensorrt")
