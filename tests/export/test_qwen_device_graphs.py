"""Qwen2.5-VL's device graphs against the portable ones and a model in NumPy, by the functions of their operators."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from tango_export.graph import device
from tango_export.models.qwen_vision import QwenVisionConfig, no_device_form
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main
from tests.export.edits import assert_close, run
from tests.export.test_qwen_graphs import FP16_FRAMES, FRAMES, steps
from tests.fakes.device_graphs import with_device_graphs
from tests.fakes.qwen25vl import Qwen25VL


def weights(folder, graph):
    """What the device graph takes of the portable one's data file."""
    spec = Bundle.load(folder).manifest.graphs[graph]
    return {n: np.memmap(folder / spec.data, w.dtype, "r", w.offset, w.shape) for n, w in spec.device_weights.items()}


@pytest.fixture(scope="module")
def fp32(qwen_bundle, tmp_path_factory):
    """A bundle whose MLPs are filled up to whole rows, and without outliers."""
    source = qwen_bundle(precision="fp32", outliers=False, vision_intermediate=84)
    return with_device_graphs(source, tmp_path_factory.mktemp("device") / "fp32", "fp32")


@pytest.mark.parametrize("shape", FRAMES[:-1], ids=str)
def test_features_and_salience_are_the_portable_graphs(fp32, shape):
    frames = steps(*shape)
    found = run(fp32, "vision.device", frames=frames, **weights(fp32, "vision"))
    for ours, wanted in zip(found, run(fp32, "vision", frames=frames), strict=True):
        assert_close(ours, wanted, 1e-5)


def test_what_fills_up_an_mlp_changes_nothing(fp32, qwen_checkpoint):
    frames = steps(2, 84, 112)
    model = Qwen25VL(qwen_checkpoint(outliers=False, vision_intermediate=84))
    given = {"frames": frames, **weights(fp32, "vision")}
    wanted = model.vision(frames.reshape(-1, 84, 112, 3))
    for found, each in zip(run(fp32, "vision.device", **given), wanted, strict=True):
        assert_close(found, each, 1e-5)


def rounded(folder, frames):
    """What the device graph gives where every tensor has its own type: ONNX Runtime's CPU provider keeps fp32."""
    feeds = {"frames": frames, **{n: np.array(w) for n, w in weights(folder, "vision").items()}}
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(onnx.load(folder / "vision.device.onnx")).run(None, feeds)


@pytest.mark.parametrize("frames", FP16_FRAMES, ids=lambda frames: str(frames.shape[2:4]))
@pytest.mark.parametrize("outliers", [True, False])
def test_fp16_holds_the_tower(qwen_bundle, qwen_checkpoint, frames, outliers):
    """Noise, a checkerboard, and white frames. With outliers an MLP adds 2e5 to a channel, which fp16 does not hold."""
    features, salience = rounded(qwen_bundle(outliers=outliers), frames)
    wanted, shares = Qwen25VL(qwen_checkpoint(outliers=outliers)).vision(frames.reshape(-1, *frames.shape[2:]))
    assert (features.dtype, salience.dtype) == (np.float16, np.float32)
    assert_close(features.astype(np.float32), wanted, 2e-2)
    assert_close(salience, shares, 5e-2)


def test_it_overflows_where_wide_values_are_not_divided(qwen_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "WIDE_SCALE", 1.0)
    naive = with_device_graphs(qwen_bundle(), tmp_path / "naive", "fp16")
    assert not np.isfinite(rounded(naive, FP16_FRAMES[0])[0]).all()


def test_every_layer_is_an_operator_and_nothing_is_left(qwen_bundle):
    folder = qwen_bundle()
    tower, decoder = (onnx.load(folder / f"{name}.device.onnx") for name in ("vision", "decoder"))
    kinds = Counter(node.op_type for node in tower.graph.node)
    layers = {"WindowAttention": 2, "FrameAttention": 2, "RotatePatches": 2, "RotateQueryKey": 1}
    layers |= {"Patches": 1, "BiasSwiGLU": 4, "WideRMSNorm": 1}
    assert {kind: kinds[kind] for kind in layers} == layers
    assert kinds["AddWideRMSNorm"] == 2 * 4
    assert not kinds.keys() & {"Where", "Sigmoid", "Sqrt", "Erf", "Less"}
    assert kinds["Softmax"] == 1  # of the salience
    assert [a.i for node in tower.graph.node for a in node.attribute if a.name == "window"] == [8, 8]
    kinds = Counter(node.op_type for node in decoder.graph.node)
    assert (kinds["PositionedAttention"], kinds["AddRMSNorm"], kinds["CachedAttention"]) == (2, 4, 0)
    assert (kinds["Cos"], kinds["Sin"]) == (1, 1)


@pytest.mark.parametrize("name", ["vision", "embed", "decoder"])
def test_they_are_standard_onnx_and_our_operators_each_with_a_function(qwen_bundle, name):
    model = onnx.load(qwen_bundle() / f"{name}.device.onnx")
    assert {opset.domain for opset in model.opset_import} <= {"", "tango"}
    own = {node.op_type for node in model.graph.node if node.domain}
    assert {(f.domain, f.name) for f in model.functions} == {("tango", op) for op in own}


def negate_sines(model):
    (node,) = (node for node in model.graph.node if node.op_type == "Sin")
    node.op_type = "Cos"


def widen_windows(model):
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "window":
                attribute.i = 2


def test_validate_compares_them_with_the_original(qwen_bundle, tmp_path, capsys):
    path = shutil.copytree(qwen_bundle(), tmp_path / "bundle")
    assert main(["validate", str(path)]) == 0
    assert "18 of 18 within the limits" in capsys.readouterr().out
    for graph, spoil in (("decoder", negate_sines), ("vision", widen_windows)):
        file = path / f"{graph}.device.onnx"
        sound, model = file.read_bytes(), onnx.load(file)
        spoil(model)
        onnx.save(model, file)
        assert main(["validate", str(path)]) == 1
        failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
        assert failed
        assert all(line.startswith(f"{graph} (device)") for line in failed)
        file.write_bytes(sound)


def test_a_tower_whose_windows_the_kernel_cannot_take_has_none():
    config = QwenVisionConfig(32, 1280, 16, 3420, 3584, 14, 2, 2, 112, ())
    assert no_device_form(config) is None
    wide = replace(config, window_size=140)
    assert no_device_form(wide) == "its attention has windows of 10×10 patches, more than 64 in all"
