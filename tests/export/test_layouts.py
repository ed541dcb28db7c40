"""Every layout of a checkpoint, against transformers that loads the same folder by itself."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipVisionModel

from examples.make_checkpoint import LAYOUTS
from tango_export.export import Request, export
from tango_plugins import TangoError
from tango_runtime.cli.main import main
from tests.export.edits import assert_close, copied, edit_json, edit_weights, frames, logits, original, rename, run

HF_LAYOUTS = [layout for layout in LAYOUTS if layout != "lmms-lab"]
IDS = np.random.default_rng(2).integers(0, 300, 23)
DATA = ("vision.onnx.data", "embed.onnx.data", "decoder.onnx.data")


def export_to(folder, llava, siglip, dtype="fp32"):
    return export(Request(checkpoint=str(llava), salience=str(siglip), output=folder, dtype=dtype))


@torch.no_grad()
def assert_graphs_equal(bundle, model, size=112, tolerance=1e-5):
    """The tolerance is relative to the largest value."""
    video = frames(3, size)
    pixels = torch.from_numpy((video.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32))
    expected = model.model.get_video_features(
        pixels[None], vision_feature_layer=-1, vision_feature_select_strategy="full"
    ).pooler_output
    features = run(bundle, "vision", frames=video)[0]
    assert_close(features.reshape(expected.shape), expected, tolerance)
    found = logits(bundle, IDS)
    assert_close(found, model(input_ids=torch.from_numpy(IDS)[None]).logits[0, -1, : len(found)], tolerance)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", HF_LAYOUTS)
def test_graphs_equal_transformers(checkpoint, bundle, layout, tied):
    llava, _ = checkpoint(layout, tied=tied, outliers=False)
    assert_graphs_equal(bundle(layout, "fp32", tied=tied, outliers=False), original(llava))


@pytest.mark.parametrize("layout", HF_LAYOUTS)
def test_graphs_with_outliers_equal_transformers(checkpoint, bundle, layout):
    """Outliers cancel in sums, so fp32 logits differ by up to 6e-4 from one CPU's instruction set to another's."""
    llava, _ = checkpoint(layout)
    assert_graphs_equal(bundle(layout, "fp32"), original(llava), tolerance=2e-3)


@pytest.mark.parametrize(("heads", "kv_heads"), [(14, 2), (4, 1)])
def test_any_grouping_of_heads_equals_transformers(checkpoint, bundle, heads, kv_heads):
    shape = {"heads": heads, "kv_heads": kv_heads, "width": 16 * heads, "outliers": False}
    llava, _ = checkpoint(**shape)
    assert_graphs_equal(bundle(precision="fp32", **shape), original(llava))


def test_odd_grid_and_frames_of_no_whole_patches_equal_transformers(checkpoint, bundle):
    llava, _ = checkpoint(image=132, outliers=False)  # 9 patches and 6 pixels; 5×5 tokens
    assert_graphs_equal(bundle(precision="fp32", image=132, outliers=False), original(llava), 132)


@torch.no_grad()
def test_salience_is_the_pooling_heads_attention(checkpoint, bundle):
    llava, siglip = checkpoint()
    tower = original(llava).model.vision_tower
    head = SiglipVisionModel.from_pretrained(siglip, dtype=torch.float32).head
    video = frames(2)
    pixels = torch.from_numpy((video.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32))
    patches = tower.post_layernorm(tower(pixels, output_hidden_states=True).hidden_states[-1])
    weights = head.attention(head.probe.expand(2, -1, -1), patches, patches)[1].reshape(2, 1, 8, 8)
    pooled = torch.nn.functional.interpolate(weights, size=(4, 4), mode="bilinear").reshape(2, 16)
    assert_close(run(bundle(precision="fp32"), "vision", frames=video)[1], pooled, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_fresh_model_saved_by_transformers(checkpoint, tmp_path, tied):
    llava, siglip = checkpoint(tied=tied)
    config = LlavaOnevisionConfig.from_pretrained(llava)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.image_newline)
    model.save_pretrained(tmp_path / "saved")
    shutil.copy(llava / "tokenizer.json", tmp_path / "saved")
    assert_graphs_equal(export_to(tmp_path / "out", tmp_path / "saved", siglip), model)


@pytest.mark.parametrize("tied", [True, False])
def test_hub_model_loaded_and_saved_again(checkpoint, bundle, tmp_path, tied):
    llava, siglip = checkpoint(tied=tied)
    original(llava, dtype=torch.float16).save_pretrained(tmp_path / "saved")
    shutil.copy(llava / "tokenizer.json", tmp_path / "saved")
    again = export_to(tmp_path / "out", tmp_path / "saved", siglip, "fp16")
    for name in DATA:
        assert (again / name).read_bytes() == (bundle(tied=tied) / name).read_bytes(), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_gives_the_same_weights(bundle, layout, tied):
    ours, hub = bundle(layout, dtype=torch.float16, tied=tied), bundle(tied=tied)
    for name in DATA:
        assert (ours / name).read_bytes() == (hub / name).read_bytes(), name


def test_module_names_of_transformers_4(checkpoint, bundle, tmp_path):
    llava, siglip = copied(checkpoint("llava-hf-module"), tmp_path)
    rename(llava, "model.vision_tower.", "model.vision_tower.vision_model.")
    again = export_to(tmp_path / "out", llava, siglip, "fp16")
    assert (again / "vision.onnx.data").read_bytes() == (bundle() / "vision.onnx.data").read_bytes()


def test_newline_follows_the_vocabulary(checkpoint, bundle):
    llava, _ = checkpoint()
    model = original(llava)
    rows = model.get_input_embeddings().weight.shape[0]
    row = run(bundle(), "embed", ids=np.array([rows]))[0][0]
    np.testing.assert_array_equal(row, model.model.image_newline.detach().half().numpy())


@pytest.mark.parametrize(
    ("layout", "dtype"), [("llava-hf", torch.bfloat16), ("llava-hf", torch.float32), ("lmms-lab", torch.bfloat16)]
)
def test_any_dtype_on_disk_validates(bundle, layout, dtype):
    assert main(["validate", str(bundle(layout, dtype=dtype))]) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_lmms_lab_validates_at_fp32(bundle, tied):
    assert main(["validate", str(bundle("lmms-lab", "fp32", tied=tied))]) == 0


def test_shards_give_the_same_weights(checkpoint, bundle):
    llava, _ = checkpoint(shards=3)
    assert len(list(llava.glob("*.safetensors"))) == 3
    for name in DATA:
        assert (bundle(shards=3) / name).read_bytes() == (bundle() / name).read_bytes()


@pytest.mark.parametrize(("top", "text"), [(False, True), (True, None), (True, True)])
def test_either_flag_ties_an_absent_head(checkpoint, bundle, tmp_path, top, text):
    llava, siglip = copied(checkpoint(), tmp_path)
    set_ties(llava, top, text)
    again = export_to(tmp_path / "out", llava, siglip, "fp16")
    assert (again / "decoder.onnx.data").read_bytes() == (bundle() / "decoder.onnx.data").read_bytes()


@pytest.mark.parametrize(("top", "text"), [(False, False), (None, None)])
def test_absent_head_that_is_not_tied_is_refused(checkpoint, tmp_path, top, text):
    llava, siglip = copied(checkpoint(), tmp_path)
    set_ties(llava, top, text)
    with pytest.raises(TangoError, match=r"is missing the weight .*head\.weight"):
        export_to(tmp_path / "out", llava, siglip)


def set_ties(llava, top, text):
    def edit(config):
        for part, tied in ((config, top), (config["text_config"], text)):
            part["tie_word_embeddings"] = tied
            if tied is None:
                del part["tie_word_embeddings"]

    edit_json(llava / "config.json", edit)


def test_siglip_without_prefix_or_with_a_config_of_its_own_kind(checkpoint, bundle, tmp_path):
    llava, siglip = copied(checkpoint("lmms-lab"), tmp_path)
    edit_weights(siglip, lambda w: [w.pop(name) for name in list(w) if not name.startswith("vision_model.")])
    rename(siglip, "vision_model.", "")
    edit_json(siglip / "config.json", lambda c: c.update(c.pop("vision_config")))
    again = export_to(tmp_path / "out", llava, siglip, "fp16")
    assert (again / "vision.onnx.data").read_bytes() == (bundle("lmms-lab") / "vision.onnx.data").read_bytes()


def test_tower_saved_with_a_head_of_its_own(checkpoint, bundle, tmp_path):
    llava, siglip = copied(checkpoint(), tmp_path)
    edit_weights(llava, lambda w: w.update({"vision_tower.vision_model.head.probe": torch.zeros(1, 1, 72)}))
    again = export_to(tmp_path / "out", llava, siglip, "fp16")
    assert (again / "vision.onnx.data").read_bytes() == (bundle() / "vision.onnx.data").read_bytes()


def test_rope_and_dtype_in_the_spelling_of_transformers_5(checkpoint, bundle, tmp_path):
    llava, siglip = copied(checkpoint(), tmp_path)

    def edit(config):
        theta = config["text_config"].pop("rope_theta")
        config["text_config"]["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
        config["dtype"] = config.pop("torch_dtype")

    edit_json(llava / "config.json", edit)
    again = export_to(tmp_path / "out", llava, siglip, "fp16")
    assert (again / "decoder.onnx.data").read_bytes() == (bundle() / "decoder.onnx.data").read_bytes()
