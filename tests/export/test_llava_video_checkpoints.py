"""LLaVA-Video: its features against transformers' modules and torch's pooling, and what is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tango_export.export import Request, export, find_preset
from tango_export.families import FAMILIES
from tango_export.models.projector import Pooling
from tango_plugins import op
from tango_runtime.bundle import Bundle, InnerPruning
from tango_runtime.cli.main import main
from tests.export.edits import assert_close, copied, edit_json, edit_weights, frames, original, run

DATA = ("vision.onnx.data", "embed.onnx.data", "decoder.onnx.data")
#: 9×9 patches: the last row and column of them are in no token.
SIZE = 126
SHAPE = {"image": SIZE, "outliers": False}


def export_to(folder, llava, siglip, **options):
    return export(Request("llava-video", str(llava), str(siglip), folder, **options))


@pytest.mark.parametrize("patches", [2, 8, 9, 27])
def test_average_pooling_is_torchs(patches):
    pooling = Pooling("average", patches)
    x = torch.randn(1, 5, patches, patches, dtype=torch.float64, generator=torch.Generator().manual_seed(patches))
    expected = torch.nn.functional.avg_pool2d(x, 2).flatten(2)[0]
    found = torch.from_numpy(pooling.matrix().astype(np.float64)) @ x.flatten(2)[0].T
    torch.testing.assert_close(found.T, expected)
    assert pooling.side == patches // 2


@torch.no_grad()
def test_features_are_those_of_the_modules_with_average_pooling(checkpoint, bundle):
    """The same weights in llava-hf's layout, which transformers reads, up to where it pools."""
    model = original(checkpoint("llava-hf", dtype=torch.bfloat16, **SHAPE)[0]).model
    video = frames(3, SIZE)
    pixels = torch.from_numpy((video.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32))
    hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    grid = model.multi_modal_projector(hidden).transpose(1, 2).unflatten(-1, (9, 9))
    expected = torch.nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    features, salience = run(bundle("llava-video", "fp32", **SHAPE), "vision", frames=video)
    assert_close(features, expected, 1e-5)
    assert salience.shape == (3, 16)
    assert (salience.sum(1) < 0.25 * (1 - 1e-3)).all()  # a quarter of the patches' shares, but for those in no token


def test_the_graphs_are_llava_onevisions_but_for_the_pooling(bundle):
    video, one_vision = (bundle(layout, tied=False, **SHAPE) for layout in ("llava-video", "lmms-lab"))
    for name in DATA[1:]:
        assert (video / name).read_bytes() == (one_vision / name).read_bytes()


@pytest.mark.parametrize(("precision", "tied"), [("fp32", True), ("fp32", False), ("fp16", False)])
def test_it_validates(bundle, precision, tied, capsys):
    assert main(["validate", str(bundle("llava-video", precision, image=SIZE, tied=tied))]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_shards_give_the_same_weights(bundle):
    for name in DATA:
        assert (bundle("llava-video", shards=3) / name).read_bytes() == (bundle("llava-video") / name).read_bytes()


def test_what_the_bundle_says(video_desk):
    assert video_desk.export("--context", "4096") == 0
    manifest = Bundle.load("out").manifest
    assert (manifest.family, manifest.video.frames) == ("llava-video", 64)
    assert (manifest.prompt.after_video, manifest.prompt.row_end) == ((), 512)
    assert (manifest.prompt.placeholder, manifest.prompt.stop) == ("<image>", (400, 402))
    assert manifest.params.tau_segment == 0.65
    assert manifest.params.at(0.15).tau_segment == 0.8
    assert op.attributes(manifest.params)["sink_positions"] == []  # a grid of 4×4 has none that are known


def test_the_default_context_holds_a_video_that_is_not_pruned(video_desk):
    assert video_desk.export() == 0
    assert Bundle.load("out").manifest.decoder.context == 16384 > 64 * 13 * 14


def test_settings_that_the_file_leaves_out_are_the_released_models(video_desk, bundle):
    def strip(config):
        for key in ("rope_theta", "rms_norm_eps", "max_position_embeddings"):
            del config[key]

    edit_json(video_desk.llava / "config.json", strip)
    assert video_desk.export() == 0
    for name in DATA:
        assert (video_desk.folder / "out" / name).read_bytes() == (bundle("llava-video") / name).read_bytes()


def test_the_published_names():
    for name in ("llava-video", "llava-video-7b"):
        family, preset = find_preset(name)
        assert family is FAMILIES["llava-video"]
        assert (preset.bundle, preset.checkpoint) == ("llava-video-7b", "lmms-lab/LLaVA-Video-7B-Qwen2")
        assert preset.salience == "google/siglip-so400m-patch14-384"


ONE_TOKEN = "mm_newline_position is 'one_token', LLaVA-Video has 'grid'"


def of_hugging_face(kind):
    return {"mm_vision_tower": None, "model_type": kind}


@pytest.mark.parametrize(
    ("changes", "error", "hint"),
    [
        ({"mm_newline_position": "one_token"}, ONE_TOKEN, "try --model llava-ov"),
        ({"mm_newline_position": None}, ONE_TOKEN, "try --model llava-ov"),
        ({"mm_newline_position": "frame"}, "mm_newline_position is 'frame'", "released"),
        ({"mm_spatial_pool_stride": 4}, "mm_spatial_pool_stride is 4, and only 2 is supported", ""),
        ({"mm_patch_merge_type": "flat"}, 'mm_patch_merge_type is "flat"', ""),
        ({"add_faster_video": True}, "add_faster_video is true, and only false is supported", ""),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, 'architectures is ["LlavaLlamaForCausalLM"]', ""),
        (of_hugging_face("llava_next_video"), "is LLaVA-NeXT-Video (llava_next_video)", "in the format of lmms-lab"),
        (of_hugging_face("llavaonevision1_5"), "is LLaVA-OneVision-1.5", "name a checkpoint of LLaVA-Video"),
        (of_hugging_face("llava_onevision"), "is LLaVA-OneVision (llava_onevision)", "a checkpoint of LLaVA-Video"),
    ],
)
def test_another_model_is_refused_by_name(video_desk, changes, error, hint):
    def edit(config):
        config.update(changes)
        for key in [key for key, value in config.items() if value is None and key in changes]:
            del config[key]

    edit_json(video_desk.llava / "config.json", edit)
    found = video_desk.refused()
    assert error in found[0]
    assert hint in found[1]


def test_llava_onevision_names_the_family_of_a_video_checkpoint(lay_desk):
    error, hint = lay_desk("llava-video").refused()
    assert "mm_newline_position is 'grid', LLaVA-OneVision has 'one_token'" in error
    assert "--model llava-video" in hint


@pytest.mark.parametrize("name", ["model.faster_token", "model.vision_resampler.mm_projector.weight"])
def test_modules_of_other_variants_are_refused_by_name(video_desk, name):
    edit_weights(video_desk.llava, lambda weights: weights.update({name: torch.zeros(3)}))
    assert name in video_desk.refused()[0]


def test_a_fine_tune_in_the_same_layout_is_taken(checkpoint, tmp_path):
    llava, siglip = copied(checkpoint("llava-video"), tmp_path)
    edit_json(llava / "config.json", lambda config: config.update(model_type="llava_qwen", mm_tunable_parts="mm_mlp"))
    assert export_to(tmp_path / "out", llava, siglip).is_dir()


def test_the_same_request_gives_the_same_bytes(checkpoint, tmp_path):
    llava, siglip = checkpoint("llava-video", **SHAPE)
    first, second = (export_to(tmp_path / name, llava, siglip, inner=InnerPruning(1, 0.5)) for name in ("a", "b"))
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
