"""Bad input through the command line: exit code 2, `error:` that names it, `hint:`, and nothing left on the disk."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer

from tango_export.families.llava.templates import HF_TEMPLATE
from tango_plugins import TangoError
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.util.files import staged_folder
from tests.export.edits import edit_json, edit_weights

HEAD = "vision_model.head.attention.in_proj_weight"
DOWN = "language_model.model.layers.1.mlp.down_proj.weight"


# The request.


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model", "llava"], "'llava'"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--checkpoint", ""], "config.json"),
        (["--checkpoint", "owner/name", "--frames", "0"], "argument --frames: '0' is not a positive integer"),
        (
            ["--checkpoint", "owner/name", "--retention-ratio", "2"],
            "argument --retention-ratio: '2' is not a number",
        ),
        (["--salience-checkpoint", "./nowhere"], "./nowhere"),
        (["--checkpoint", "~nobody-of-this-name/model"], "~nobody-of-this-name/model"),
        (["--checkpoint", "llava/config.json"], "llava/config.json"),
        (["--retention-ratio", "0"], "argument --retention-ratio: '0' is not a number above 0 and at most 1"),
        (["--retention-ratio", "1.5"], "argument --retention-ratio: '1.5' is not a number above 0 and at most 1"),
        (["--retention-ratio", "nan"], "argument --retention-ratio: 'nan' is not a number above 0 and at most 1"),
        (["--retention-ratio", "0.12345"], "retention_ratio is 0.12345"),
        (["--retention-ratio", "half"], "--retention-ratio"),
        (["--frames", "0"], "argument --frames: '0' is not a positive integer"),
        (["--frames", "-3"], "argument --frames: '-3' is not a positive integer"),
        (["--frames", "many"], "--frames"),
        (["--context", "0"], "argument --context: '0' is not a positive integer"),
        (["--context", "32769"], "--context is 32769"),
        (["--sink-positions", "196"], "sink_positions is 196"),
        (["--sink-positions", "-1"], "argument --sink-positions: '-1' is not a non-negative integer"),
        (["--dtype", "fp8"], "--dtype"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_bad_argument(desk, monkeypatch, arguments, names):
    unreachable(monkeypatch)
    assert names in desk.refused(*arguments)[0]


def test_unknown_model_lists_the_known_ones(desk):
    assert "llava-ov-0.5b" in desk.refused("--model", "llava-ov-72b")[1]


def test_longest_context_is_accepted(desk):
    assert desk.export("--context", "32768") == 0


# config.json.


@pytest.mark.parametrize(
    ("given", "sinks"), [((), ()), (("--sink-positions",), ()), (("--sink-positions", "3", "5"), (3, 5))]
)
def test_sink_positions(desk, given, sinks):
    assert desk.export(*given) == 0
    assert Bundle.load("out").manifest.params.sink_positions == sinks


def test_the_budget_is_the_bundles(desk):
    assert desk.export("--budget", "exact") == 0
    assert Bundle.load("out").manifest.params.budget == "exact"


def test_config_missing(desk):
    (desk.llava / "config.json").unlink()
    assert "config.json" in desk.refused()[0]


#: Files that are no JSON object: cut, of another kind, not UTF-8, nested too deeply, of an integer that is too long.
NO_OBJECT = ["", "{", "[1]", "null", "\udcff", "[" * 100_000, f'{{"a": {"9" * 5000}}}']


@pytest.mark.parametrize("text", NO_OBJECT)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "chat_template.json"])
def test_file_that_is_no_json_object(desk, file, text):
    (desk.llava / file).write_bytes(text.encode(errors="surrogateescape"))
    assert file in desk.refused()[0]


@pytest.mark.parametrize(
    ("part", "changes", "names"),
    [
        (None, {"model_type": "llava_next"}, "llava_next"),
        (None, {"vision_feature_layer": -2}, "vision_feature_layer is -2"),
        (None, {"text_config": "x"}, "text_config"),
        (None, {"vision_config": [1]}, "vision_config"),
        ("text_config", {"model_type": "llama"}, 'model_type is "llama"'),
        ("vision_config", {"model_type": "clip_vision_model"}, 'model_type is "clip_vision_model"'),
        ("text_config", {"hidden_size": "64"}, 'hidden_size is "64"'),
        ("text_config", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("text_config", {"rope_theta": True}, "rope_theta is true"),
        ("text_config", {"rope_scaling": {"type": "yarn"}}, "rope_scaling: type"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters: rope_type"),
        ("text_config", {"rope_parameters": {"type": "linear", "factor": 2.0}}, "rope_parameters: type"),
        ("text_config", {"rope_parameters": {"factor": 2.0}}, "rope_parameters: factor"),
        ("text_config", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("text_config", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
        ("text_config", {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ("text_config", {"rope_parameters": "x"}, "rope_parameters"),
        ("text_config", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("text_config", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("text_config", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ("text_config", {"use_sliding_window": True}, "use_sliding_window"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act"),
        ("text_config", {"num_attention_heads": 3}, ""),
        ("vision_config", {"hidden_act": "quick_gelu"}, "hidden_act"),
        ("vision_config", {"num_attention_heads": 5}, "num_attention_heads"),
    ],
)
def test_config_of_another_model(desk, part, changes, names):
    edit_json(desk.llava / "config.json", lambda config: (config[part] if part else config).update(changes))
    assert names in desk.refused()[0]


#: What is no size of anything, as Python's JSON reads it.
NO_NUMBER = [float("nan"), float("inf"), -1, 0, True, "64", None, [64], {}, 2**40, 10**400]


@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("text_config", "hidden_size"),
        ("text_config", "num_hidden_layers"),
        ("text_config", "num_key_value_heads"),
        ("text_config", "rope_theta"),
        ("text_config", "rms_norm_eps"),
        ("text_config", "max_position_embeddings"),
        ("vision_config", "image_size"),
        ("vision_config", "patch_size"),
        ("vision_config", "layer_norm_eps"),
    ],
)
def test_config_with_a_number_out_of_range(desk, part, key, value):
    edit_json(desk.llava / "config.json", lambda config: config[part].update({key: value}))
    assert f"config.json: {key} is" in desk.refused()[0]


@pytest.mark.parametrize(("image", "patch"), [(4096, 1), (14, 14), (10, 14)])
def test_config_with_too_many_patches_or_too_few(desk, image, patch):
    edit_json(desk.llava / "config.json", lambda c: c["vision_config"].update(image_size=image, patch_size=patch))
    assert f"image_size {image} and patch_size {patch}" in desk.refused()[0]


def test_settings_that_change_nothing_are_accepted(desk):
    plain = {"rope_scaling": {"type": "default"}, "layer_types": ["full_attention"] * 2, "partial_rotary_factor": 1}
    edit_json(desk.llava / "config.json", lambda config: config["text_config"].update(plain))
    assert desk.export() == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_use_im_start_end", True),
        ("mm_use_im_patch_token", True),
        ("mm_resampler_type", "perceiver"),
        ("architectures", ["LlavaLlamaForCausalLM"]),
        ("mm_projector_type", "linear"),
        ("mm_spatial_pool_mode", "average"),
        ("mm_spatial_pool_stride", 4),
        ("mm_newline_position", "grid"),
        ("mm_patch_merge_type", "flat"),
        ("rope_scaling", {"type": "linear", "factor": 2}),
    ],
)
def test_lmms_lab_config_of_another_model(lmms_desk, key, value):
    edit_json(lmms_desk.llava / "config.json", lambda config: config.update({key: value}))
    assert re.search(rf"config\.json: {key}(: \w+)? is ", lmms_desk.refused()[0])


def test_lmms_lab_siglip_without_a_config(lmms_desk):
    (lmms_desk.siglip / "config.json").unlink()
    error, _ = lmms_desk.refused()
    assert "siglip" in error
    assert "config.json" in error


def test_lmms_lab_siglip_with_a_config_of_nonsense(lmms_desk):
    edit_json(lmms_desk.siglip / "config.json", lambda config: config.update(vision_config="x"))
    assert "vision_config" in lmms_desk.refused()[0]


# Weights.


def test_siglip_without_a_pooling_head(desk):
    error, hint = desk.refused("--salience-checkpoint", "llava")
    assert "llava has no SigLIP pooling head" in error
    assert "--salience-checkpoint google/siglip-so400m-patch14-384" in hint


def test_lmms_lab_siglip_without_a_pooling_head(lmms_desk):
    assert "llava has no SigLIP pooling head" in lmms_desk.refused("--salience-checkpoint", "llava")[0]


@pytest.mark.parametrize("name", ["attention.in_proj_weight", "attention.in_proj_bias"])
def test_siglip_with_half_of_a_pooling_head(desk, name):
    edit_weights(desk.siglip, lambda w: w.pop(f"vision_model.head.{name}"))
    assert name in desk.refused()[0]


def test_pooling_head_of_another_siglip(desk):
    edit_weights(desk.siglip, lambda w: w.update({"vision_model.head.probe": torch.zeros(1, 1, 80)}))
    assert "head.probe has shape [1, 1, 80]" in desk.refused()[0]


def test_missing_weight(desk):
    edit_weights(desk.llava, lambda w: w.pop(DOWN))
    error, _ = desk.refused()
    assert "is missing the weight" in error
    assert "layers.1.mlp.down_proj.weight" in error


@pytest.mark.parametrize(
    "name",
    [
        "image_newline",
        "vision_tower.vision_model.post_layernorm.bias",
        "language_model.model.layers.1.self_attn.k_proj.bias",
    ],
)
def test_missing_weight_of_any_part(desk, name):
    edit_weights(desk.llava, lambda w: w.pop(name))
    assert name.split(".")[-1].removeprefix("image_") in desk.refused()[0]


def test_misshapen_weight(desk):
    edit_weights(desk.llava, lambda w: w.update({DOWN: w[DOWN][:, :-1]}))
    error, _ = desk.refused()
    assert f"{DOWN} has shape [64, 127]" in error
    assert "[64, 128]" in error


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "language_model.model.layers.2.mlp.down_proj.weight",
        "model.vision_resampler.query",
        "multi_modal_projector.linear_3.weight",
        "extra",
    ],
)
def test_unknown_weight(desk, name):
    edit_weights(desk.llava, lambda w: w.update({name: torch.zeros(3)}))
    assert name in desk.refused()[0]


def test_one_weight_under_two_names(desk):
    edit_weights(desk.llava, lambda w: w.update({"model.image_newline": w["image_newline"].clone()}))
    error, _ = desk.refused()
    assert "model.image_newline" in error


def test_weights_in_two_precisions_are_named(desk):
    shutil.copy(desk.llava / "model.safetensors", desk.llava / "model.fp16.safetensors")
    error, hint = desk.refused()
    assert "in model.safetensors and" in error
    assert "in model.fp16.safetensors are the same tensor" in error
    assert "one precision" in hint


def test_weights_that_are_no_file(desk):
    (desk.llava / "model.safetensors").unlink()
    os.mkfifo(desk.llava / "model.safetensors")
    assert "llava has no file model.safetensors" in desk.refused()[0]


@pytest.mark.parametrize("size", [0, 4, 500, 100_000])
def test_cut_weights(desk, size):
    os.truncate(desk.llava / "model.safetensors", size)
    assert "model.safetensors is cut" in desk.refused()[0]


def test_cut_siglip(desk):
    os.truncate(desk.siglip / "model.safetensors", 100_000)
    assert "siglip/model.safetensors is cut" in desk.refused()[0]


def test_no_weights(desk):
    (desk.llava / "model.safetensors").unlink()
    assert "llava has no safetensors file" in desk.refused()[0]


@pytest.fixture
def sharded(desk, checkpoint):
    shutil.rmtree(desk.llava)
    shutil.copytree(checkpoint(shards=3)[0], desk.llava)
    return desk


def test_missing_shard(sharded):
    (sharded.llava / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in sharded.refused()[0]


def test_cut_shard(sharded):
    os.truncate(sharded.llava / "model-00003-of-00003.safetensors", 50_000)
    assert "model-00003-of-00003.safetensors is cut" in sharded.refused()[0]


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', *NO_OBJECT])
def test_index_that_is_none(sharded, text):
    (sharded.llava / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    assert INDEX in sharded.refused()[0]


@pytest.mark.parametrize(
    "name", ["/shard", "../shard", "a/../../shard", "a/b", "a\\b", "C:\\a", "", ".", "..", "a\0b", 1, None]
)
def test_index_that_names_a_file_elsewhere(sharded, name):
    shutil.copy(sharded.llava / "model-00001-of-00003.safetensors", sharded.folder / "shard")
    named = str(sharded.folder / "shard") if name == "/shard" else name
    edit_json(sharded.llava / INDEX, lambda index: index["weight_map"].update(image_newline=named))
    assert f"{INDEX}: " in sharded.refused()[0]
    (sharded.folder / "shard").unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00004.safetensors"])
def test_weights_of_another_save_beside_the_shards(sharded, name):
    shutil.copy(sharded.llava / "model-00001-of-00003.safetensors", sharded.llava / name)
    error, _ = sharded.refused()
    assert f"has {name}, which {INDEX} does not list" in error


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_adapter_beside_the_weights(desk, checkpoint, name, shards):
    shutil.rmtree(desk.llava)
    shutil.copytree(checkpoint(shards=shards)[0], desk.llava)
    (desk.llava / name).write_text("{}")
    error, hint = desk.refused()
    assert f"llava has an adapter, {name}" in error
    assert "merge" in hint


@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_weight_that_fp16_does_not_hold(desk, value):
    def spoil(weights):
        weights[DOWN] = weights[DOWN].float()
        weights[DOWN][3, 5] = value

    edit_weights(desk.llava, spoil)
    error, hint = desk.refused()
    assert "layers.1.mlp.down_proj.weight" in error
    assert ("fp32" in hint) == (value == 1e5)  # no dtype holds NaN
    assert desk.export("--dtype", "fp32") == (0 if value == 1e5 else 2)


def test_quantized_weight(desk):
    edit_weights(desk.llava, lambda w: w.update(image_newline=torch.ones(64, dtype=torch.int8)))
    error, _ = desk.refused()
    assert "image_newline is stored as I8" in error


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_quantized_pooling_head(desk, dtype):
    edit_weights(desk.siglip, lambda w: w.update({HEAD: w[HEAD].to(dtype)}))
    assert re.search(f"{HEAD} is stored as (F8_E4M3|I8|C64)", desk.refused()[0])


# Text.


def test_tokenizer_missing(desk):
    (desk.llava / "tokenizer.json").unlink()
    assert "tokenizer" in desk.refused()[0]


def test_tokenizer_of_vocabulary_and_merges(desk, bundle):
    model = json.loads((desk.llava / "tokenizer.json").read_text())
    (desk.llava / "vocab.json").write_text(json.dumps(model["model"]["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["model"]["merges"]]
    (desk.llava / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {token["content"]: token["id"] for token in model["added_tokens"]}
    (desk.llava / "added_tokens.json").write_text(json.dumps(added))
    (desk.llava / "tokenizer.json").unlink()
    assert desk.export() == 0
    ours, shared = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (desk.folder / "out", bundle()))
    text = "<|im_start|>user <video>\nWhich way does it move?<|im_end|>"
    assert ours.encode(text).ids == shared.encode(text).ids


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_a_tokenizer(desk, name):
    (desk.llava / "tokenizer.json").unlink()
    (desk.llava / name).write_text("{}")
    assert "tokenizer.json" in desk.refused()[0]


def test_tokenizer_unreadable(desk):
    (desk.llava / "tokenizer.json").write_text("{}")
    assert "tokenizer" in desk.refused()[0]


def test_tokenizer_larger_than_the_table(desk):
    def grow(data):
        tokens = {f"<{i}>": i for i in range(405, 700)}
        data["added_tokens"] += [{**data["added_tokens"][0], "id": i, "content": token} for token, i in tokens.items()]

    edit_json(desk.llava / "tokenizer.json", grow)
    error, _ = desk.refused()
    assert "tokenizer has 700 ids" in error


@pytest.mark.parametrize("model", [{"type": "BPE", "vocab": {}, "merges": []}, {"type": "WordLevel", "vocab": {}}])
def test_tokenizer_without_a_vocabulary(desk, model):
    (desk.llava / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"unk_token": "x", **model}}))
    assert "empty vocabulary" in desk.refused()[0]


def test_tokenizer_that_cannot_encode_the_template(desk):
    known = {"<|im_start|>": 0, "<|im_end|>": 1}
    model = {"type": "WordLevel", "vocab": known, "unk_token": "x"}
    (desk.llava / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    assert "tokenizer.json cannot encode" in desk.refused()[0]


#: How files beside a tokenizer.json name a token.
NAMED = [
    ("added_tokens.json", {"<own>": 404}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"404": {"content": "<own>"}}}),
    ("tokenizer_config.json", {"additional_special_tokens": ["<own>"]}),
    ("tokenizer_config.json", {"extra_special_tokens": {"own_token": "<own>"}}),
    ("tokenizer_config.json", {"extra_special_tokens": ["<own>"]}),
    ("special_tokens_map.json", {"additional_special_tokens": [{"content": "<own>"}]}),
]


@pytest.mark.parametrize(("file", "content"), NAMED)
def test_a_token_that_only_another_file_names(desk, file, content):
    (desk.llava / file).write_text(json.dumps(content))
    assert f"llava/{file} names the token '<own>'" in desk.refused()[0]


@pytest.mark.parametrize(("file", "content"), NAMED)
def test_a_token_that_files_agree_on(desk, file, content):
    text = json.dumps(content).replace("<own>", "<video>")
    (desk.llava / file).write_text(
        text.replace("404", str(Tokenizer.from_file("llava/tokenizer.json").token_to_id("<video>")))
    )
    assert desk.export() == 0


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"added_tokens_decoder": [1]}, "names a token 1, which is no text"),
        ({"added_tokens_decoder": 5}, "added_tokens_decoder is 5, not an object or a list"),
        ({"added_tokens_decoder": {"x": "<video>"}}, "names the token '<video>' with the id -1"),
        ({"added_tokens_decoder": {"9" * 5000: "<video>"}}, "names the token '<video>' with the id -1"),
        ({"added_tokens_decoder": {"7": "<video>"}}, "names the token '<video>' with the id 7"),
        ({"additional_special_tokens": [None]}, "names a token null, which is no text"),
        ({"extra_special_tokens": "x"}, 'extra_special_tokens is "x"'),
    ],
)
def test_tokens_that_are_none(desk, content, error):
    (desk.llava / "tokenizer_config.json").write_text(json.dumps(content))
    assert error in desk.refused()[0]


@pytest.mark.parametrize("id_", [5, 2**31])
def test_an_added_token_whose_id_the_tokenizer_does_not_give(desk, id_):
    edit_json(desk.llava / "tokenizer.json", lambda data: data["added_tokens"][-1].update(id=id_))
    assert f"with the id {id_}, tokenizer.json reads it as" in desk.refused()[0]


def test_padding_and_truncation_of_training(desk):
    tokenizer = Tokenizer.from_file(str(desk.llava / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(1)
    tokenizer.save(str(desk.llava / "tokenizer.json"))
    assert desk.export() == 0


@pytest.mark.parametrize("ids", [True, 2.5, -1, 2**40, "<|im_end|>", [1, None], [[1]], {"a": 1}, float("nan")])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_stop_token_that_is_no_id(desk, file, ids):
    edit_json(desk.llava / file, lambda data: data.get("text_config", data).update(eos_token_id=ids))
    assert f"llava/{file}: eos_token_id has" in desk.refused()[0]


def test_no_stop_token_of_the_tokenizer(desk):
    tokens = json.loads((desk.llava / "tokenizer.json").read_text())
    ends = [token for token in tokens["added_tokens"] if token["content"] in ("<|im_end|>", "<|endoftext|>")]
    for token in ends:
        token["content"] = token["content"].upper()
    (desk.llava / "tokenizer.json").write_text(json.dumps(tokens))
    for file in ("generation_config.json", "config.json"):
        edit_json(desk.llava / file, lambda data: data.get("text_config", data).update(eos_token_id=9999))
    assert "names no token that ends an answer" in desk.refused()[0]


# Chat templates.


@pytest.fixture
def own(desk):
    """A template unlike the family's; the checkpoint has none."""
    (desk.llava / "chat_template.json").unlink()
    return HF_TEMPLATE.replace("<|im_start|>", "<|im_start|>own ")


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("several", [False, dict, list])
def test_template_in_any_place(desk, own, file, several):
    named = {"tool_use": "x", "default": own}
    as_list = [{"name": name, "template": template} for name, template in named.items()]
    (desk.llava / file).write_text(json.dumps({"chat_template": {False: own, dict: named, list: as_list}[several]}))
    assert desk.export() == 0
    assert (desk.folder / "out/chat_template.jinja").read_text() == own


@pytest.mark.parametrize(
    "template", [5, True, [], {}, ["x"], {"tool_use": "x"}, [{"name": "x", "template": "y"}], "\ud83d"]
)
def test_template_that_is_none(desk, own, template):
    (desk.llava / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert "tokenizer_config.json: chat_template is not" in desk.refused()[0]


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_template_is_told(desk, own, text):
    (desk.llava / "chat_template.jinja").write_text(text)
    assert desk.export() == 0
    assert "llava has an empty chat template; llava-hf's is used" in desk.capsys.readouterr().err


def test_the_template_that_transformers_takes_of_several(desk, own):
    other = own.replace("own ", "other ")
    places = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")
    for i, name in enumerate(places):
        text = own if i == 0 else other
        (desk.llava / name).write_text(text if name.endswith(".jinja") else json.dumps({"chat_template": text}))
    for i, name in enumerate(places):
        assert desk.export("--overwrite") == 0
        assert (desk.folder / "out/chat_template.jinja").read_text() == (other if i else own)
        told = "holds another chat template than" in desk.capsys.readouterr().err
        assert told == (i == 0)  # the others hold the same one, and the tokenizer's is the text model's
        (desk.llava / name).unlink()


def test_an_empty_template_beside_a_whole_one(desk, own):
    (desk.llava / "chat_template.json").write_text(json.dumps({"chat_template": ""}))
    (desk.llava / "chat_template.jinja").write_text(own)
    assert desk.export() == 0
    assert (desk.folder / "out/chat_template.jinja").read_text() == own
    assert "llava/chat_template.json holds another chat template" in desk.capsys.readouterr().err


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_named_templates_in_files_of_their_own(desk, own, name):
    (desk.llava / "additional_chat_templates").mkdir()
    (desk.llava / f"additional_chat_templates/{name}.jinja").write_text(own)
    if name == "default":
        assert desk.export() == 0
        assert (desk.folder / "out/chat_template.jinja").read_text() == own
    else:
        assert "none named default" in desk.refused()[0]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("token", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_a_template_writes_special_tokens_by_their_names(desk, own, file, token):
    (desk.llava / "tokenizer_config.json").unlink()
    (desk.llava / file).write_text(
        json.dumps({"eos_token": token, "bos_token": None, "extra_special_tokens": {"a": "?"}})
    )
    begin = "  {% if bos_token is defined %}B{% endif %}\n{{ a }}"
    (desk.llava / "chat_template.jinja").write_text(begin + own.replace("'<|im_end|>'", "eos_token"))
    assert desk.export() == 0
    prompt = Prompt.of(Bundle.load("out"))
    before, after = (prompt._tokenizer.decode(ids, skip_special_tokens=False) for ids in prompt.encode("Q"))
    assert before == "?<|im_start|>own user "
    assert after == "\nQ<|im_end|><|im_start|>own assistant\n"


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({}, "uses sep_token, which tokenizer_config.json does not name"),
        ({"sep_token": 5}, "names a token 5, which is no text"),
    ],
)
def test_a_template_with_a_token_that_is_not_named(desk, own, config, error):
    (desk.llava / "tokenizer_config.json").write_text(json.dumps(config))
    (desk.llava / "chat_template.jinja").write_text(own + "{{ sep_token }}")
    assert error in desk.refused()[0]


def test_a_template_with_a_byte_order_mark(desk, own):
    (desk.llava / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf" + own.encode())
    assert "chat_template.jinja begins with a byte order mark" in desk.refused()[0]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_template_that_is_not_utf8(desk, own, encoding):
    (desk.llava / "chat_template.jinja").write_bytes(f"{own}{{# café #}}".encode(encoding))
    assert "chat_template.jinja is not valid UTF-8" in desk.refused()[0]


@pytest.mark.parametrize(
    ("before", "error"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "within"),
        ("{{ 1 / 0 }}", "zero"),
    ],
)
def test_template_is_refused_before_weights_are_read(desk, own, monkeypatch, before, error):
    monkeypatch.setattr("tango_export.checkpoint.Checkpoint.read", None)
    monkeypatch.setattr("tango_runtime.pipeline.chat_template._PROCESSOR_S", 1)
    (desk.llava / "chat_template.jinja").write_text(before + own)
    assert error in desk.refused()[0]


# The hub.


def unreachable(monkeypatch):
    def download(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


@pytest.mark.parametrize("error", [OSError, ValueError, Exception])
def test_any_fault_of_a_download_is_told(desk, monkeypatch, error):
    def download(*_, **__):
        raise error("the line is cut\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert "the hub did not give owner/name: the line is cut" in desk.refused("--salience-checkpoint", "owner/name")[0]


def test_hub_out_of_reach(desk, monkeypatch):
    unreachable(monkeypatch)
    error, hint = desk.refused("--checkpoint", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
    assert "the hub did not give llava-hf/llava-onevision-qwen2-0.5b-ov-hf: no network" in error
    assert "--checkpoint" in hint


def test_a_folder_without_a_checkpoint_is_rejected_before_a_download(desk, monkeypatch, tmp_path):
    unreachable(monkeypatch)
    error, _ = desk.refused("--checkpoint", str(tmp_path), "--salience-checkpoint", "owner/name")
    assert error == f"error: {tmp_path} has no config.json"


def test_hub_is_asked_for_both_and_names_the_bundle(desk, monkeypatch):
    asked = []

    def download(name, **_):
        asked.append(name)
        return str(desk.siglip if "siglip" in name else desk.llava)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert main(["export", "--model", "llava-ov", "--no-validate"]) == 0
    assert asked == ["llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "google/siglip-so400m-patch14-384"]
    source = Bundle.load(desk.folder / "llava-ov-0.5b", verify=True).manifest.source
    assert (source.checkpoint, source.salience) == tuple(asked)


def test_folders_named_relatively_are_found_from_elsewhere(desk, monkeypatch):
    unreachable(monkeypatch)
    (desk.folder / "models").mkdir()
    desk.llava.rename(desk.folder / "models/llava")  # which looks like an id on the hub
    assert desk.export("--checkpoint", "models/llava") == 0
    monkeypatch.chdir("/")
    assert main(["validate", str(desk.folder / "out")]) == 0


# The output.


def test_output_that_exists(desk):
    assert desk.export() == 0
    whole = (desk.folder / "out/bundle.json").read_bytes()
    error, hint = desk.refused()
    assert "out already exists" in error
    assert "--overwrite" in hint
    assert desk.export("--overwrite", "--frames", "8") == 0
    assert (desk.folder / "out/bundle.json").read_bytes() != whole
    assert Bundle.load("out", verify=True).manifest.video.frames == 8


def test_failed_overwrite_keeps_the_old_bundle(desk):
    assert desk.export() == 0
    edit_weights(desk.llava, lambda w: w[DOWN].fill_(float("inf")))
    desk.refused("--overwrite")
    Bundle.load("out", verify=True)


@pytest.mark.parametrize("output", ["llava", "thesis", ".", "file"])
def test_overwrite_replaces_bundles_only(desk, output):
    (desk.folder / "thesis").mkdir()
    (desk.folder / "thesis/thesis.tex").write_text("years of work")
    (desk.folder / "file").write_text("a file")
    error, _ = desk.refused("--overwrite", "--output", output)
    assert output in error
    assert (desk.folder / "thesis/thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("output", ["llava", "siglip", "."])
def test_output_that_would_replace_the_checkpoint(desk, output):
    for folder in (desk.llava, desk.siglip, desk.folder):
        (folder / "bundle.json").touch()  # as if it were a bundle, which --overwrite replaces
    assert "would replace --" in desk.refused("--overwrite", "--output", output)[0]
    for folder in (desk.llava, desk.siglip, desk.folder):
        (folder / "bundle.json").unlink()


def test_output_that_is_not_utf8(desk):
    assert "is not valid UTF-8" in desk.refused("--output", os.fsdecode(b"out\xff"))[0]


@pytest.mark.parametrize("output", ["file/out", "n" * 300, "/proc/out"])
def test_output_that_cannot_be_made(desk, output):
    (desk.folder / "file").write_text("a file")
    assert output in desk.refused("--output", output)[0]


def test_folders_above_the_output_are_made_and_removed(desk):
    edit_weights(desk.llava, lambda w: w[DOWN].fill_(float("inf")))
    desk.refused("--output", "new/deep/out")


def test_two_exports_to_one_output(desk):
    with staged_folder(Path("out"), holding="bundle.json") as folder:
        (folder / "half").touch()
        assert "another process is writing out" in desk.refused()[0]
        assert (folder / "half").exists()


# The disk.


def test_no_space(desk, monkeypatch):
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    error, hint = desk.refused()
    assert "no space left" in error
    assert "MB" in error
    assert "--output" in hint


@pytest.mark.parametrize("where", ["tango_export.graph.files.onnx.save", "tango_export.export.write_manifest"])
def test_disk_that_fills_up(desk, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    assert "no space left" in desk.refused()[0]


def test_debug_shows_the_traceback(desk):
    with pytest.raises(TangoError):
        desk.export("--model", "x", "--debug")


def test_sound_checkpoint_is_exported_whole(desk):
    assert desk.export() == 0
    assert "bundle: out" in desk.capsys.readouterr().err
    names = {file.name for file in (desk.folder / "out").iterdir()}
    listed = json.loads((desk.folder / "out/bundle.json").read_text())["files"]
    assert names == set(listed) | {"bundle.json"}
    assert sorted(path.name for path in desk.folder.iterdir()) == ["llava", "out", "siglip"]
