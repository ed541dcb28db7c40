"""Checkpoints of AWQ and GPTQ: their 4-bit layers are repacked as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tango_export.checkpoint import Checkpoint, read_packing
from tango_export.export import Request, export
from tango_export.packing import parse_packing
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main
from tests.export.edits import assert_close, edit_json, edit_weights, logits
from tests.export.packed import GROUP, SETTINGS, packed

IDS = np.random.default_rng(3).integers(0, 300, 12)
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def qwen(qwen_checkpoint, tmp_path_factory):
    """``qwen(kind)``: a Qwen2.5-VL in 4 bits, and the same numbers in fp32."""
    folder, made = tmp_path_factory.mktemp("packed"), {}
    return lambda kind: made.get(kind) or made.setdefault(kind, packed(qwen_checkpoint(tied=False), folder, kind))


def exported(model, checkpoint, output, **options):
    return export(Request(model, str(checkpoint), output=output, context=512, **options))


@pytest.mark.parametrize("kind", SETTINGS)
def test_weights_are_read_as_their_elements_say(qwen, kind):
    stored, plain = qwen(kind)
    found = Checkpoint(stored, str, read_packing(stored))
    expected = Checkpoint(plain, str)
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(found.read(name), expected.read(name), name)


def dense(bundle, name):
    """A layer of a bundle's decoder, [out, in], from its blocks."""
    spec = bundle.manifest.graphs["decoder"]

    def stored(name):
        weight = spec.weights[name]
        return np.memmap(bundle.path / spec.data, weight.dtype, "r", weight.offset, weight.shape)

    layout = spec.weights[f"{name}.int4"].quantization
    assert (layout.bits, layout.group_size) == (4, GROUP)
    elements = halves(stored(f"{name}.int4"))
    scales = stored(layout.scales).astype(np.float32)
    zeros = 8 if layout.zero_points is None else halves(stored(layout.zero_points))[:, : scales.shape[1], None]
    return ((elements - zeros) * scales[..., None]).reshape(len(scales), -1)


def halves(packed):
    return np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1).astype(np.float32)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_bundle_has_the_checkpoints_elements(qwen, kind, tmp_path):
    stored, plain = qwen(kind)
    bundle = Bundle.load(exported("qwen2.5-vl", stored, tmp_path / "stored"))
    expected = Checkpoint(plain, str)
    for layer in (0, 1):
        scope = f"layers.{layer}"
        for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            np.testing.assert_array_equal(
                dense(bundle, f"{scope}.{name}.weight"), expected.read(f"model.{scope}.{name}.weight")
            )
        parts = [expected.read(f"model.{scope}.self_attn.{part}_proj.weight") for part in "qkv"]
        np.testing.assert_array_equal(dense(bundle, f"{scope}.self_attn.qkv_proj.weight"), np.concatenate(parts))
    spec = bundle.manifest.graphs["decoder"]
    assert (spec.runtimes, spec.quantization.precision, spec.quantization.excluded) == (
        ("onnxruntime",),
        "int4",
        ("lm_head",),
    )
    assert {name for name in spec.weights if ".int4" in name} <= spec.device_weights.keys()
    assert not bundle.manifest.graphs["vision"].quantization


@pytest.mark.parametrize("kind", ["awq", "gptq_sym"])
def test_it_answers_as_the_same_numbers_do(checkpoint, kind, tmp_path):
    llava, siglip = checkpoint("llava-hf", outliers=False)
    stored, plain = packed(llava, tmp_path, kind)
    one, other = (
        exported("llava-ov", folder, tmp_path / name, salience=str(siglip), dtype="fp32")
        for name, folder in (("one", stored), ("other", plain))
    )
    assert_close(logits(one, IDS), logits(other, IDS), 0.02)  # activations are rounded to 8 bits
    assert main(["validate", str(one)]) == 0


def test_inspect_says_that_it_was_quantized_before(qwen, tmp_path, capsys):
    assert main(["inspect", str(exported("qwen2.5-vl", qwen("awq")[0], tmp_path / "bundle")), "--verify"]) == 0
    assert "without clips" in capsys.readouterr().out


# Refusals


@pytest.fixture
def spoiled(qwen_checkpoint, tmp_path, capsys):
    """``spoiled(kind, settings=…, weights=…)``: what the export of a changed checkpoint says."""

    def refused(kind="awq", settings=None, weights=None):
        stored, _ = packed(qwen_checkpoint(tied=False), tmp_path, kind)
        if settings:
            edit_json(stored / "config.json", lambda data: data["quantization_config"].update(settings))
        if weights:
            edit_weights(stored, weights)
        command = ["export", "--model", "qwen2.5-vl", "--checkpoint", stored, "--output", tmp_path / "out"]
        assert main([*map(str, command), "--no-validate"]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    return refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 8}, "bits is 8, and only 4"),
        ({"bits": True}, "bits is true"),
        ({"group_size": -1}, "group_size is -1, and only 32, 64, 128"),
        ({"version": "gemv"}, "version is 'gemv'"),
        ({"zero_point": False}, "zero_point is false"),
        ({"quant_method": "compressed-tensors"}, "quant_method is 'compressed-tensors', and only awq or gptq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"quant_method": "gptq", "format": "marlin"}, "format is 'marlin'"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "is_marlin_format is true"),
        (
            {"quant_method": "gptq", "format": "gptq_v2", "checkpoint_format": "gptq"},
            "checkpoint_format and format name different formats",
        ),
        ({"format": "gemv"}, "format is 'gemv'"),
    ],
)
def test_other_quantizations_are_refused_by_name(spoiled, settings, said):
    assert said.replace("'", '"') in spoiled(settings=settings).replace("'", '"')


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_every_programs_name_of_a_format_is_read(key):
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, key: "gptq_v2"}
    assert parse_packing(settings, "config.json").zero_offset == 0
    assert parse_packing({**settings, key: None}, "config.json").zero_offset == 1


def test_act_order_is_refused(spoiled):
    def shuffled(weights):
        weights[f"{LAYER}.g_idx"] = weights[f"{LAYER}.g_idx"].flip(0)

    assert f"{LAYER}.g_idx has inputs in the order of their activations (act-order)" in spoiled(
        "gptq", weights=shuffled
    )


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_a_missing_part_is_named(spoiled, part):
    assert f"is missing the weight {LAYER}.{part}" in spoiled(weights=lambda weights: weights.pop(f"{LAYER}.{part}"))


def test_a_part_of_another_shape_is_named(spoiled):
    def cut(weights):
        weights[f"{LAYER}.scales"] = weights[f"{LAYER}.scales"][1:].clone()

    assert f"{LAYER}.scales is F16" in spoiled(weights=cut)


def test_a_group_that_is_not_the_checkpoints_is_named(spoiled):
    assert "qzeros is I32 [4, 8], not I32 [1, 8]" in spoiled(settings={"group_size": 128})


def test_a_zero_point_out_of_range_is_named(spoiled):
    def full(weights):
        weights[f"{LAYER}.qzeros"] = torch.full_like(weights[f"{LAYER}.qzeros"], -1)  # 15, and one more

    assert "has a zero point of 16" in spoiled("gptq", weights=full)


def test_zero_points_of_a_symmetric_checkpoint_are_the_middle(spoiled):
    def other(weights):
        weights[f"{LAYER}.qzeros"] = torch.zeros_like(weights[f"{LAYER}.qzeros"])

    assert "has other zero points than 8" in spoiled("gptq_sym", weights=other)


def test_packed_weights_without_settings_are_unknown(spoiled):
    assert "quant_method" in spoiled(settings={"quant_method": None})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}),
        ("quant_config.json", {"w_bit": 4, "q_group_size": GROUP, "version": "GEMM", "zero_point": True}),
    ],
)
def test_older_checkpoints_have_settings_in_a_file_of_their_own(tmp_path, name, settings):
    (tmp_path / "config.json").write_text("{}")
    assert read_packing(tmp_path) is None
    (tmp_path / name).write_text("{}")
    edit_json(tmp_path / name, lambda data: data.update(settings))
    packing = read_packing(tmp_path)
    assert (packing.method, packing.group) == ("gptq" if "desc_act" in settings else "awq", GROUP)
