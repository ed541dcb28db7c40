"""Qwen2.5-VL checkpoints as they lie on disk: layouts, spellings of config.json, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tango_export.export import Request, export, known_models
from tango_export.families import FAMILIES
from tango_plugins import TangoError
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main
from tango_runtime.pipeline.prompt import Prompt
from tests.export.edits import edit_json, edit_weights, rename, run

DATA = [f"{graph}.onnx.data" for graph in ("vision", "embed", "decoder")]


def export_to(folder, checkpoint, **options):
    return export(Request("qwen2.5-vl", str(checkpoint), output=folder, **options))


def same_data(one, other):
    for name in DATA:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture
def copy(qwen_checkpoint, tmp_path):
    """A copy of a checkpoint of some layout, to be edited."""
    return lambda layout="hub", **options: Path(
        shutil.copytree(qwen_checkpoint(layout, **options), tmp_path / "checkpoint")
    )


def test_the_published_checkpoints_have_names():
    presets = FAMILIES["qwen2.5-vl"].presets
    assert {name: preset.checkpoint for name, preset in presets.items()} == {
        "qwen2.5-vl": "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    }
    assert set(presets) <= set(known_models())
    assert all(preset.salience is None for preset in presets.values())


# Layouts


@pytest.mark.parametrize("tied", [True, False])
def test_the_layouts_give_the_same_weights(qwen_bundle, tied):
    same_data(qwen_bundle("module", tied=tied), qwen_bundle("hub", tied=tied))


def test_shards_give_the_same_weights(qwen_checkpoint, qwen_bundle):
    assert len(list(qwen_checkpoint(shards=3).glob("*.safetensors"))) == 3
    same_data(qwen_bundle(shards=3), qwen_bundle())


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_loaded_and_saved_by_transformers(qwen_checkpoint, qwen_bundle, tmp_path, tied):
    """It nests the decoder's settings, and the tower's have other names."""
    folder = qwen_checkpoint(tied=tied)
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "text_config" in saved and "hidden_size" not in saved  # noqa: PT018
    for name in ("tokenizer.json", "chat_template.json"):
        shutil.copy(folder / name, tmp_path / "saved")
    again = export_to(tmp_path / "out", tmp_path / "saved")
    same_data(again, qwen_bundle(tied=tied))
    ours, theirs = (Bundle.load(path).manifest for path in (again, qwen_bundle(tied=tied)))
    assert (ours.decoder, ours.vision, ours.video) == (theirs.decoder, theirs.vision, theirs.video)


def test_frequencies_in_the_file_are_left_out(copy, qwen_bundle, tmp_path):
    folder = copy()
    buffer = {
        "visual.rotary_pos_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    edit_weights(folder, lambda weights: weights.update(buffer))
    same_data(export_to(tmp_path / "out", folder), qwen_bundle())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_dtype_on_disk(copy, qwen_bundle, tmp_path, dtype):
    folder = copy(outliers=False)
    edit_weights(folder, lambda weights: weights.update({name: w.to(dtype) for name, w in weights.items()}))
    same_data(export_to(tmp_path / "out", folder), qwen_bundle(outliers=False))


def test_embedding_rows_are_those_of_the_checkpoint(qwen_bundle, qwen_checkpoint):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_checkpoint(), dtype=torch.float32)
    ids = np.arange(0, 400, 7)
    rows = model.get_input_embeddings().weight[torch.from_numpy(ids)].detach().numpy()
    np.testing.assert_array_equal(run(qwen_bundle(precision="fp32"), "embed", ids=ids)[0], rows)


# Spellings of config.json


def test_settings_that_old_files_leave_out(copy, qwen_bundle, tmp_path):
    """Files of transformers 4.49 and 4.50 lack what equalled its defaults of then."""
    folder = copy()

    def edit(config):
        vision = config["vision_config"]
        for key in ("patch_size", "spatial_merge_size", "temporal_patch_size", "window_size", "hidden_act", "in_chans"):
            del vision[key]
        for key in ("tokens_per_second", "out_hidden_size"):
            del vision[key]
        for key in ("rms_norm_eps", "rope_theta", "max_position_embeddings", "hidden_act", "use_sliding_window"):
            del config[key]

    edit_json(folder / "config.json", edit)
    again = export_to(tmp_path / "out", folder)
    same_data(again, qwen_bundle())
    assert Bundle.load(again).manifest.decoder == Bundle.load(qwen_bundle()).manifest.decoder


@pytest.mark.parametrize("kind", ["default", "mrope"])
def test_both_names_of_the_rope(copy, qwen_bundle, tmp_path, kind):
    folder = copy()
    edit_json(folder / "config.json", lambda c: c["rope_scaling"].update(type=kind, rope_type=kind))
    same_data(export_to(tmp_path / "out", folder), qwen_bundle())


@pytest.mark.parametrize(("top", "text"), [(True, None), (False, True), (None, True)])
def test_either_flag_ties_an_absent_head(copy, qwen_bundle, tmp_path, top, text):
    folder = copy()
    edit_json(
        folder / "config.json", lambda c: c.update(tie_word_embeddings=top, text_config={"tie_word_embeddings": text})
    )
    same_data(export_to(tmp_path / "out", folder), qwen_bundle())


def test_a_checkpoint_without_a_template_gets_the_released_one(copy, qwen_bundle, tmp_path):
    folder = copy()
    (folder / "chat_template.json").unlink()
    ours, theirs = (Prompt.of(Bundle.load(path)) for path in (export_to(tmp_path / "out", folder), qwen_bundle()))
    for found, wanted in zip(ours.encode("Who?"), theirs.encode("Who?"), strict=True):
        np.testing.assert_array_equal(found, wanted)
    before, after = theirs._template.around_video("Who?")
    assert before == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert after == "<|vision_end|>Who?<|im_end|>\n<|im_start|>assistant\n"


# Validation


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("tied", [True, False])
def test_validate_compares_with_transformers(qwen_bundle, precision, tied, capsys):
    assert main(["validate", str(qwen_bundle(precision=precision, tied=tied))]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_validate_finds_positions_on_wrong_axes(responsive_qwen, tmp_path, capsys):
    """The same weights with other sections: only where rows and columns have ids of their own does it show."""
    folder = Path(shutil.copytree(responsive_qwen()[0], tmp_path / "checkpoint"))
    bundle = export_to(tmp_path / "out", folder, dtype="fp32")
    edit_json(folder / "config.json", lambda c: c["rope_scaling"].update(mrope_section=[4, 2, 2]))
    edit_json(bundle / "bundle.json", lambda m: m["decoder"]["rotary"].update(sections=[4, 2, 2]))
    assert main(["validate", str(bundle)]) == 1
    assert "logits at 47" in next(line for line in capsys.readouterr().out.splitlines() if "FAILED" in line)


# What is refused


def refusal(folder, tmp_path, **options):
    with pytest.raises(TangoError) as caught:
        export_to(tmp_path / "out", folder, **options)
    assert not (tmp_path / "out").exists()
    return caught.value.message


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("qwen2_vl", "Qwen2-VL"),
        ("qwen3_vl", "Qwen3-VL"),
        ("qwen3_vl_moe", "Qwen3-VL"),
        ("llava_onevision", "llava_onevision"),
    ],
)
def test_other_models_are_named(copy, tmp_path, kind, title):
    folder = copy()
    edit_json(folder / "config.json", lambda c: c.update(model_type=kind))
    assert refusal(folder, tmp_path).endswith(f"is a {title} model, not Qwen2.5-VL")


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        (None, "hidden_act", "gelu", 'hidden_act is "gelu"'),
        (None, "use_sliding_window", True, "use_sliding_window is true"),
        (None, "hidden_size", None, "has no hidden_size"),
        (
            None,
            "layer_types",
            ["full_attention", "sliding_attention"],
            'layer_types is ["full_attention", "sliding_attention"]',
        ),
        (None, "head_dim", 32, "head_dim is 32"),
        (None, "num_attention_heads", 5, "num_attention_heads is 5, which does not divide 64"),
        ("rope_scaling", "type", "yarn", 'type is "yarn"'),
        ("rope_scaling", "mrope_section", [2, 3, 4], "mrope_section is [2, 3, 4], whose sum is not half"),
        ("rope_scaling", "mrope_section", [2, 6], "mrope_section is [2, 6], not three positive integers"),
        ("vision_config", "hidden_act", "quick_gelu", 'hidden_act is "quick_gelu"'),
        ("vision_config", "patch_size", 16, "patch_size is 16"),
        ("vision_config", "temporal_patch_size", 1, "temporal_patch_size is 1"),
        ("vision_config", "spatial_merge_size", 4, "spatial_merge_size is 4"),
        ("vision_config", "in_chans", 4, "in_chans is 4"),
        ("vision_config", "out_hidden_size", 3584, "out_hidden_size is 3584"),
        ("vision_config", "window_size", 100, "windows 100 pixels"),
        ("vision_config", "num_heads", 3, "num_heads is 3, which does not divide 64"),
        ("vision_config", "num_heads", 32, "heads are 2 wide"),
        ("vision_config", "depth", 0, "depth is 0, not a positive int"),
        ("vision_config", "fullatt_block_indexes", [1, 2], "fullatt_block_indexes is [1, 2]"),
        ("vision_config", "fullatt_block_indexes", [3, 9], "fullatt_block_indexes is [3, 9]"),
        ("vision_config", "fullatt_block_indexes", "all", 'fullatt_block_indexes is "all"'),
        ("vision_config", "rope_parameters", {"rope_theta": 1e6}, "rope_theta is 1000000.0"),
        ("vision_config", "tokens_per_second", 0.5, "tokens_per_second is 0.5"),
        (None, "vision_config", 3, "vision_config is 3, not an object"),
    ],
)
def test_settings_of_other_graphs_are_refused_by_name(copy, tmp_path, part, key, value, message):
    folder = copy()
    edit_json(folder / "config.json", lambda c: (c[part] if part else c).update({key: value}))
    assert message in refusal(folder, tmp_path)


def test_a_head_that_is_neither_there_nor_tied(copy, tmp_path):
    folder = copy()
    edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=False))
    assert "is missing the weight lm_head.weight" in refusal(folder, tmp_path)


def test_unknown_and_misshapen_tensors(copy, tmp_path):
    folder = copy("module")
    edit_weights(folder, lambda weights: weights.update({"model.visual.deepstack.0.weight": torch.ones(2)}))
    assert "does not know: model.visual.deepstack.0.weight" in refusal(folder, tmp_path)
    edit_weights(folder, lambda weights: weights.pop("model.visual.deepstack.0.weight"))
    edit_weights(folder, lambda weights: weights.update({"model.visual.blocks.0.norm1.weight": torch.ones(2)}))
    assert "model.visual.blocks.0.norm1.weight has shape [2]" in refusal(folder, tmp_path)


def test_two_layouts_at_once(copy, tmp_path):
    folder = copy()
    edit_weights(
        folder, lambda w: w.update({"model.visual.merger.ln_q.weight": w["visual.merger.ln_q.weight"].clone()})
    )
    assert "are the same tensor" in refusal(folder, tmp_path)


def test_a_tokenizer_without_the_vision_tokens(copy, checkpoint, tmp_path):
    folder = copy()
    shutil.copy(checkpoint("llava-hf")[0] / "tokenizer.json", folder)
    assert "the tokenizer has no <|vision_start|>" in refusal(folder, tmp_path)


def test_a_mistaken_prefix_is_missed_by_the_name_in_the_file(copy, tmp_path):
    folder = copy()
    rename(folder, "visual.merger.", "visual.blender.")
    assert "visual.blender." in refusal(folder, tmp_path)


def test_options_of_other_families(copy, checkpoint, tmp_path):
    folder = copy()
    with pytest.raises(TangoError, match="takes its salience from its own tower"):
        export_to(tmp_path / "out", folder, salience=str(folder))
    llava, siglip = checkpoint()
    for options, message in (
        ({"time_step": "unit"}, "one position"),
        ({"max_pixels": 10**5}, "all frames are 112x112"),
    ):
        with pytest.raises(TangoError, match=message):
            export(Request(checkpoint=str(llava), salience=str(siglip), output=tmp_path / "out", **options))


# What a bundle says of its frames


@pytest.mark.parametrize(
    ("options", "size", "pixels"),
    [
        ({}, (560, 1008), (100352, 602112)),
        ({"frame": (336, 588)}, (336, 588), (100352, 602112)),
        ({"max_pixels": 200_000}, (308, 588), (100352, 200_000)),
        ({"max_pixels": 50_000}, (140, 280), (1, 50_000)),
        ({"frames": 768}, (336, 644), (100352, 602112)),
    ],
)
def test_frame_size_and_budget(qwen_checkpoint, tmp_path, options, size, pixels):
    manifest = Bundle.load(export_to(tmp_path / "out", qwen_checkpoint(), **options)).manifest
    video, grid = manifest.video, (size[0] // 28, size[1] // 28)
    assert (video.size, (video.budget.min_pixels, video.budget.max_pixels)) == (size, pixels)
    assert (manifest.params.grid, video.tokens_per_frame) == (grid, grid[0] * grid[1])
    assert manifest.vision.patches == 4 * grid[0] * grid[1]


def test_a_frame_size_is_made_of_whole_tokens(qwen_checkpoint, tmp_path):
    assert "the frame size is 100x560" in refusal(qwen_checkpoint(), tmp_path, frame=(100, 560))
