"""`tango plan`: its arithmetic against what was measured, its verdicts, its refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tango_plugins import TangoError
from tango_runtime import engines
from tango_runtime.bundle import Bundle, Quantization, write_manifest
from tango_runtime.cli.main import main
from tango_runtime.sizing import (
    RELEASED,
    Options,
    find_model,
    plan,
    prefill_time,
    prune_time,
    remedy,
    smallest,
    token_time,
    vision_time,
)
from tango_runtime.sizing.devices import DEVICES, find_device

SMALL, LARGE = RELEASED["llava-ov-0.5b"], RELEASED["llava-ov-7b"]
H200, NANO = DEVICES["h200"], DEVICES["orin-nano-8gb"]


def _fp16(model):
    return 2 * (model.decoder.parameters + model.head)


#: Milliseconds on an H200, fp16, random weights: the chain in ONNX Runtime's fused operators, and the operator's own
#: (benchmarks/results/h200-onnxruntime-*.json, prune-h200.json). With the factor that the estimate is held within:
#: kernels that are launched one by one are most of the time of the 0.5B's prefill. A step attends to 1024 positions.
MEASURED = [
    ("tower and projector, 0.5B", vision_time(SMALL, H200, 32), 41.3, 1.15),
    ("tower and projector, 7B", vision_time(LARGE, H200, 32), 43.1, 1.15),
    ("prefill of 659, 0.5B", prefill_time(SMALL, H200, 659, "fp16", _fp16(SMALL)), 2.74, 1.15),
    ("prefill of 659, 7B", prefill_time(LARGE, H200, 659, "fp16", _fp16(LARGE)), 17.0, 1.15),
    ("prefill of 6303, 0.5B", prefill_time(SMALL, H200, 6303, "fp16", _fp16(SMALL)), 20.8, 1.6),
    ("prefill of 6303, 7B", prefill_time(LARGE, H200, 6303, "fp16", _fp16(LARGE)), 165.6, 1.15),
    ("a token, 0.5B", token_time(SMALL, H200, 1024, _fp16(SMALL)), 0.87, 1.15),
    ("a token, 7B", token_time(LARGE, H200, 1024, _fp16(LARGE)), 4.1, 1.15),
    ("operator, 32 frames, 7B", prune_time(LARGE, H200, 32), 0.497, 1.3),
    ("operator, 32 frames, 0.5B", prune_time(SMALL, H200, 32), 0.296, 1.3),
    ("operator, 128 frames, 7B", prune_time(LARGE, H200, 128), 18.208, 1.3),
]


@pytest.mark.parametrize(("work", "estimate", "measured", "factor"), MEASURED, ids=[row[0] for row in MEASURED])
def test_the_estimate_is_near_what_was_measured(work, estimate, measured, factor):
    assert measured / factor < 1e3 * estimate < measured * factor


@pytest.mark.parametrize(("gigabytes_per_s", "measured"), [(102.4, 21.75), (68.3, 14.2)])
def test_the_estimate_is_near_what_nvidia_published_for_a_device_that_nothing_was_fitted_to(gigabytes_per_s, measured):
    """Qwen2.5-7B on an Orin Nano, in MLC's q4f16 (4.5 bits, the head too), after and before the Super mode.

    developer.nvidia.com/blog/nvidia-jetson-orin-nano-developer-kit-gets-a-super-boost, as others cite it.
    """
    weights = (LARGE.decoder.parameters + LARGE.head) * 4.5 / 8
    rate = 1 / token_time(LARGE, replace(NANO, bandwidth=gigabytes_per_s), 128, weights)
    assert measured / 1.15 < rate < measured * 1.15


@pytest.mark.parametrize(("model", "parameters"), [(SMALL, 893_675_552), (LARGE, 8_030_807_584)])
def test_the_released_models_have_their_checkpoints_parameters(model, parameters):
    head = 0 if model is SMALL else model.head  # tied: stored once
    table = model.table * model.decoder.width
    linear = model.tower.parameters + sum(model.projector) + model.decoder.parameters + head
    assert linear + table == pytest.approx(parameters, rel=0.003)  # the rest are biases, norms and positions


@pytest.mark.parametrize(("name", "sparse"), [("orin-nano-4gb", 34), ("orin-nano-8gb", 67), ("agx-orin-64gb", 171)])
def test_peaks_are_half_of_the_sparse_ones_that_nvidia_prints(name, sparse):
    assert 2 * DEVICES[name].peaks["int8"] == pytest.approx(sparse, rel=0.02)


@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [("orin-nano-8gb", 7620), ("orin-nx-16gb", 15657), ("agx-orin-64gb", 62841), ("agx-thor", 125772)],
)
def test_what_a_jetson_keeps_for_itself_is_as_cuda_tells(name, mebibytes):
    assert DEVICES[name].usable + 1.5e9 == pytest.approx(mebibytes * 2**20, rel=0.02)


def test_every_device_has_its_figures_and_where_they_come_from():
    for device in DEVICES.values():
        assert device.source
        assert 0 < device.usable < device.total
        assert device.peaks["int8"] >= device.peaks["fp16"] > 0 < device.bandwidth


def test_pruning_saves_time_and_memory():
    pruned, whole = (plan(LARGE, H200, Options(prune=each)) for each in (True, False))
    assert (pruned.sizes.kept, whole.sizes.kept) == (628, 6272)
    assert pruned.times.first_token < whole.times.first_token / 2
    assert pruned.memory.cache < whole.memory.cache / 4
    assert whole.times.prune == whole.memory.workspace == 0


def test_the_workspace_is_what_the_operator_asks_for():
    assert plan(LARGE, H200, Options()).memory.workspace == pytest.approx(205_872_896, rel=0.001)
    assert plan(SMALL, H200, Options()).memory.workspace == pytest.approx(170e6, rel=0.01)


def test_lower_precision_takes_less_and_a_remedy_fits():
    device = DEVICES["orin-nx-16gb"]
    options = Options()
    full, half = plan(LARGE, device, options), plan(LARGE, device, Options(vision="int8", decoder="int4"))
    assert not full.fits
    assert half.fits
    assert half.memory.decoder < full.memory.decoder / 2
    assert half.times.token < full.times.token / 2
    changed = remedy(full, options)
    assert changed.frames == 32
    assert plan(LARGE, device, changed).fits
    assert smallest(full, options) == "agx-orin-32gb"


def test_what_nothing_makes_fit_has_no_remedy():
    options = Options()
    assert remedy(plan(LARGE, DEVICES["orin-nano-4gb"], options), options) is None


def test_a_bundle_is_planned_as_it_would_be_built(bundle):
    folder = bundle()
    found = plan(find_model(str(folder)), NANO, Options())
    machine = engines.Machine("10.3", "8.7", "Orin")
    planned = engines.plan(Bundle.load(folder), machine, engines.BuildOptions(), ["vision", "embed", "decoder"])
    assert [getattr(found.memory, each.graph) for each in planned] == [each.estimate.weights for each in planned]
    assert found.memory.activations == max(each.estimate.activations for each in planned)
    assert found.memory.cache == planned[2].estimate.cache
    told = max(each.estimate.build_device + each.estimate.build_host for each in planned)
    assert found.build < told < found.build + 3e9  # which counts what the libraries take too


def test_the_decoders_inner_width_follows_from_a_bundles_size(bundle):
    from examples.make_checkpoint import Shape

    # Biases and norms are counted with it: a sixth of so narrow a model, and nothing of a real one.
    assert find_model(str(bundle())).decoder.inner == pytest.approx(2 * Shape().intermediate, rel=0.2)


def test_a_quantised_bundle_is_taken_as_it_is(bundle, tmp_path):
    folder = tmp_path / "quantised"
    folder.mkdir()
    source = Bundle.load(bundle())
    for name in source.manifest.files:
        (folder / name).symlink_to(source.path / name)
    graphs = dict(source.manifest.graphs)
    graphs["decoder"] = replace(graphs["decoder"], quantization=Quantization("int4", clips=0, excluded=()))
    write_manifest(folder, replace(source.manifest, graphs=graphs))
    model = find_model(str(folder))
    assert plan(model, H200, Options()).sizes.decoder == "int4"
    with pytest.raises(TangoError, match="--decoder is int8, and the bundle is int4 already"):
        plan(model, H200, Options(decoder="int8"))


def test_a_float32_bundle_is_refused(bundle):
    with pytest.raises(TangoError, match="is in float32"):
        find_model(str(bundle(precision="fp32")))


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("a10", Options(vision="fp8"), r"NVIDIA A10 cannot run fp8 \(vision\)"),
        ("xavier-nx", Options(decoder="int4", prune=False), r"cannot run int4 \(decoder\)"),
        ("xavier-nx", Options(), "operator needs compute capability 7.5, Jetson Xavier NX 8GB has 7.2"),
        ("h200", Options(vision="int4"), "--vision is 'int4'"),
        ("h200", Options(frames=0), "--frames is 0"),
        ("h200", Options(context=100), "a prompt of 659 tokens needs as many positions"),
        ("h200", Options(frames=256, prune=False), "a prompt of 50207 tokens is longer than llava-ov-7b's 32768"),
        ("h200", Options(retention_ratio=2), "retention_ratio is 2"),
        ("h200", Options(retention_ratio=0.1, prune=False), "exclude each other"),
    ],
)
def test_refusals_name_what_is_wrong(device, options, message):
    with pytest.raises(TangoError, match=message):
        plan(LARGE, find_device(device), options)


def _tango(capsys, *arguments):
    code = main(["plan", *arguments])
    return code, *capsys.readouterr()


def test_the_verdict_is_the_exit_code(capsys):
    code, out, _ = _tango(capsys, "--model", "llava-ov-0.5b", "--device", "orin-nano-8gb")
    assert code == 0
    assert "\nfits: " in out
    assert "estimated, not measured" in out
    code, out, _ = _tango(capsys, "--model", "llava-ov-7b", "--device", "orin-nx-16gb")
    assert code == 1
    assert "does not fit" in out
    assert "would fit with --decoder int8, or as it is on agx-orin-32gb" in out
    assert "of the same compute capability" in out


def test_json_has_the_figures(capsys):
    code, out, _ = _tango(capsys, "--model", "llava-ov-7b", "--device", "orin-nano-8gb", "--decoder", "int4", "--json")
    told = json.loads(out)
    assert (code, told["fits"], told["would_fit"]) == (1, False, "--frames 1 --vision int8")
    assert told["fits_on"] == "orin-nx-16gb"
    parts = ("vision", "embed", "decoder", "cache", "activations", "workspace", "tensors")
    assert told["bytes"]["total"] == sum(told["bytes"][part] for part in parts)
    assert told["estimated_tokens_per_second"] == pytest.approx(1 / told["estimated_seconds"]["token"])


def test_all_devices_have_a_line_each(capsys):
    code, out, _ = _tango(capsys, "--model", "llava-ov-7b", "--device", "all")
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[1:]] == list(DEVICES)
    assert "operator needs compute capability 7.5" in lines[1 + list(DEVICES).index("xavier-nx")]
    code, out, _ = _tango(capsys, "--model", "llava-ov-7b", "--device", "all", "--json")
    assert [each["device"] for each in json.loads(out)] == list(DEVICES)


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["--model", "gpt", "--device", "h200"], "there is no model 'gpt'", "llava-ov-0.5b, llava-ov-7b"),
        (["--model", "llava-ov-7b", "--device", "tx2"], "there is no device 'tx2'", "orin-nano-8gb"),
        (["--model", "llava-ov-7b", "--device", "all", "--decoder", "int2"], "--decoder is 'int2'", "fp16, int8, fp8"),
    ],
)
def test_unknown_names_are_told_the_known_ones(capsys, arguments, error, hint):
    code, out, err = _tango(capsys, *arguments)
    assert (code, out) == (2, "")
    assert error in err
    assert hint in err
