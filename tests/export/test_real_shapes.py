"""The released checkpoints in full size: names, shapes and counts, in sparse files that take no disk."""

from __future__ import annotations

import json
import math

import pytest

from examples.make_checkpoint import make_tokenizer
from tango_export.families import FAMILIES
from tango_export.graph import DEVICE, PORTABLE, build
from tests.export.sparse import write_shards, write_sparse

SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
TEXT = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
ROWS = {
    ("llava-hf", "0.5b"): 152000,
    ("llava-hf", "7b"): 152128,
    ("lmms-lab", "0.5b"): 151936,
    ("lmms-lab", "7b"): 152064,
    ("llava-video", "7b"): 152064,
}
TENSORS = {"0.5b": 716, "7b": 765}
#: The sums of the released files' sizes, two bytes each.
PARAMETERS = {
    ("llava-hf", "0.5b"): 893_675_552,
    ("llava-hf", "7b"): 8_030_807_584,
    ("lmms-lab", "0.5b"): 893_618_208,
    ("lmms-lab", "7b"): 8_030_348_832,
    ("llava-video", "7b"): 8_030_348_832,
}
PREFIXES = {  # decoder, head, projector, newline, tower
    "llava-hf": (
        "language_model.model.",
        "language_model.lm_head.weight",
        ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
        "image_newline",
        "vision_tower.vision_model.",
    ),
    "lmms-lab": (
        "model.",
        "lm_head.weight",
        ("model.mm_projector.0.", "model.mm_projector.2."),
        "model.image_newline",
        "model.vision_tower.vision_tower.vision_model.",
    ),
}
PREFIXES["llava-video"] = PREFIXES["lmms-lab"]
#: Family, tokens along an edge of a frame, frames.
FAMILY = dict.fromkeys(("llava-hf", "lmms-lab"), ("llava-ov", 14, 32)) | {"llava-video": ("llava-video", 13, 64)}


def tower(prefix, layers):
    shapes = {
        f"{prefix}embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{prefix}embeddings.patch_embedding.bias": (1152,),
        f"{prefix}embeddings.position_embedding.weight": (729, 1152),
        f"{prefix}post_layernorm.weight": (1152,),
        f"{prefix}post_layernorm.bias": (1152,),
    }
    for n in range(layers):
        layer = f"{prefix}encoder.layers.{n}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{name}.weight": (1152, 1152), f"{layer}self_attn.{name}.bias": (1152,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (1152,), f"{layer}{name}.bias": (1152,)}
        shapes |= {f"{layer}mlp.fc1.weight": (4304, 1152), f"{layer}mlp.fc1.bias": (4304,)}
        shapes |= {f"{layer}mlp.fc2.weight": (1152, 4304), f"{layer}mlp.fc2.bias": (1152,)}
    return shapes


def llava(layout, size):
    decoder, head, projector, newline, vision = PREFIXES[layout]
    rows = ROWS[layout, size]
    width, inner, layers, kv = {"0.5b": (896, 4864, 24, 128), "7b": (3584, 18944, 28, 512)}[size]
    shapes = tower(vision, 26) | {
        f"{decoder}embed_tokens.weight": (rows, width),
        f"{decoder}norm.weight": (width,),
        f"{projector[0]}weight": (width, 1152),
        f"{projector[0]}bias": (width,),
        f"{projector[1]}weight": (width, width),
        f"{projector[1]}bias": (width,),
        newline: (width,),
    }
    if size == "7b":
        shapes[head] = (rows, width)
    for n in range(layers):
        layer = f"{decoder}layers.{n}."
        for name, out in (("q", width), ("k", kv), ("v", kv)):
            proj = f"{layer}self_attn.{name}_proj"
            shapes |= {f"{proj}.weight": (out, width), f"{proj}.bias": (out,)}
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, width)
        shapes |= {f"{layer}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes


def siglip():
    shapes = {
        "vision_model.head.probe": (1, 1, 1152),
        "vision_model.head.attention.in_proj_weight": (3456, 1152),
        "vision_model.head.attention.in_proj_bias": (3456,),
        "vision_model.head.attention.out_proj.weight": (1152, 1152),
        "vision_model.head.attention.out_proj.bias": (1152,),
        "vision_model.head.layernorm.weight": (1152,),
        "vision_model.head.layernorm.bias": (1152,),
        "vision_model.head.mlp.fc1.weight": (4304, 1152),
        "vision_model.head.mlp.fc1.bias": (4304,),
        "vision_model.head.mlp.fc2.weight": (1152, 4304),
        "vision_model.head.mlp.fc2.bias": (1152,),
    }
    text = {"text_model.embeddings.token_embedding.weight": (32000, 1152), "logit_scale": (1,), "logit_bias": (1,)}
    return tower("vision_model.", 27) | shapes | text


def config(layout, size):
    text = {**TEXT[size], "vocab_size": ROWS[layout, size], "rope_theta": 1000000.0}
    if layout == "llava-hf":
        vision = {**SIGLIP, "model_type": "siglip_vision_model", "num_hidden_layers": 26, "vision_use_head": False}
        tie = {"tie_word_embeddings": True} if size == "0.5b" else {}
        return {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "model_type": "llava_onevision",
            "image_token_index": 151646,
            "ignore_index": -100,
            "projector_hidden_act": "gelu",
            "vision_aspect_ratio": "anyres_max_9",
            "use_image_newline_parameter": True,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.45.0.dev0",
            "text_config": {**text, **tie, "model_type": "qwen2", "bos_token_id": 151643, "eos_token_id": 151645},
            "vision_config": vision,
        }
    return {
        **text,
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_hidden_size": 1152,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": "grid" if layout == "llava-video" else "one_token",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_resampler_type": None,
        "mm_use_im_start_end": False,
    }


def write_llava(folder, layout, size):
    folder.mkdir()
    dtype = "F16" if layout == "llava-hf" else "BF16"
    write_shards(folder, llava(layout, size), dtype, 4 if size == "7b" else 1)
    (folder / "config.json").write_text(json.dumps(config(layout, size)))
    make_tokenizer(layout != "llava-hf").save(str(folder / "tokenizer.json"))


def load(tmp_path, layout, size, context=8192):
    write_llava(tmp_path / "llava", layout, size)
    (tmp_path / "siglip").mkdir()
    write_sparse(tmp_path / "siglip/model.safetensors", siglip(), "F32", 4)
    vision = {**SIGLIP, "num_hidden_layers": 27}
    (tmp_path / "siglip/config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    folders = {"checkpoint": tmp_path / "llava", "salience": tmp_path / "siglip"}
    return FAMILIES[FAMILY[layout][0]].load(folders, context)


@pytest.mark.parametrize(("layout", "size"), ROWS)
def test_released_checkpoints_are_accepted(tmp_path, layout, size):
    shapes = llava(layout, size)
    assert len(shapes) == TENSORS[size]
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[layout, size]
    model = load(tmp_path, layout, size)
    _, side, frames = FAMILY[layout]
    assert (model.video.size, model.video.tokens_per_frame, model.params.grid) == ((384, 384), side**2, (side,) * 2)
    assert model.video.frames == frames
    newline = ROWS[layout, size]
    assert (model.prompt.after_video, model.prompt.row_end) == (((newline,), None) if side == 14 else ((), newline))
    assert model.params.sink_positions == ((28, 27, 41, 169, 11, 12) if side == 14 else (26, 157, 11))
    wanted = (24, 896, 2, 64) if size == "0.5b" else (28, 3584, 4, 128)
    decoder = model.decoder
    assert (decoder.layers, decoder.hidden_size, decoder.kv_heads, decoder.head_dim) == wanted
    # fp16, but for norms, the folded probe, angles and the salience's pooling; a tied head is written twice
    graphs = [build(definition, PORTABLE, "float16") for definition in model.definitions]
    written = sum(weight.bytes for graph in graphs for weight in graph.weights) / 2
    rows = math.prod(shapes[next(name for name in shapes if name.endswith("embed_tokens.weight"))])
    assert written == pytest.approx(PARAMETERS[layout, size] + (rows if size == "0.5b" else 0), rel=1e-3)


@pytest.mark.parametrize(("layout", "size"), [("llava-hf", "0.5b"), ("llava-hf", "7b"), ("llava-video", "7b")])
def test_released_checkpoints_have_a_device_form_on_the_same_matrices(tmp_path, layout, size):
    for definition in load(tmp_path, layout, size).definitions:
        assert definition.no_device_form is None
        graphs = (build(definition, form, "float16") for form in (PORTABLE, DEVICE))
        portable, device = ({weight.name: weight for weight in graph.weights} for graph in graphs)
        matrices = {name for name, weight in portable.items() if len(weight.shape) > 1}
        assert matrices <= device.keys()
