"""Make a small LLaVA-OneVision or LLaVA-Video checkpoint with random weights, in the format of a real one.

    python examples/make_checkpoint.py FOLDER [--layout llava-hf | llava-hf-fresh | lmms-lab | llava-video]

writes FOLDER/llava and FOLDER/siglip: the same files, tensor names, prompts and geometry as the released checkpoints
(384×384 frames, 27×27 patches, 14×14 or 13×13 tokens), scaled down in width and depth. It knows no facts and answers
nonsense; it is there so that every step can be run without a download. It needs PyTorch (pip install torch).

The weights carry what makes real ones hard in fp16: key biases of ±150, and residual channels of 1e4.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

#: Of LLaVA-OneVision.
LAYOUTS = ("llava-hf", "llava-hf-fresh", "llava-hf-module", "lmms-lab")

#: LLaVA-Video's: lmms-lab's, with other settings.
VIDEO_LAYOUT = "llava-video"

#: Canonical prefix → prefix on disk.
PREFIXES = {
    # on the hub, written by transformers 4.45, and what today's writes of a model loaded from there
    "llava-hf": {"decoder.": "language_model.model.", "head.": "language_model.lm_head.", "tower.": "vision_tower.vision_model.",
                 "projector.": "multi_modal_projector.", "newline": "image_newline"},
    # a model made and saved by transformers 5
    "llava-hf-fresh": {"decoder.": "language_model.model.", "head.": "language_model.lm_head.", "tower.": "vision_tower.",
                       "projector.": "multi_modal_projector.", "newline": "image_newline"},
    # the module names of transformers 5, as a state_dict has them
    "llava-hf-module": {"decoder.": "model.language_model.", "head.": "lm_head.", "tower.": "model.vision_tower.",
                        "projector.": "model.multi_modal_projector.", "newline": "model.image_newline"},
    "lmms-lab": {"decoder.": "model.", "head.": "lm_head.", "tower.": "model.vision_tower.vision_tower.vision_model.",
                 "projector.linear_1.": "model.mm_projector.0.", "projector.linear_2.": "model.mm_projector.2.", "newline": "model.image_newline"},
}  # fmt: skip
PREFIXES[VIDEO_LAYOUT] = PREFIXES["lmms-lab"]

HF_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: What the tokenizer is trained on: enough English for whole words, and every byte besides.
CORPUS = (
    "what happens in the video? a red ball moves to the left. how many blue squares are there? two. "
    "which way does it move? up, down, left, right. the scene changes and a green circle appears behind the yellow "
    "triangle. where is the small object? in the corner. the camera pans slowly. yes. no. first, then, after, before. "
)


@dataclass(frozen=True)
class Shape:
    """Dimensions of a checkpoint; the defaults are a small one."""

    vision_width: int = 72
    vision_intermediate: int = 144
    vision_layers: int = 2
    vision_heads: int = 3
    image: int = 384
    patch: int = 14
    width: int = 64
    intermediate: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocab: int | None = None
    tied: bool = True


_TOWER = (1152, 4304, 26, 16, 384, 14)

#: The released ones, in full size.
RELEASED = {
    "0.5b": Shape(*_TOWER, 896, 4864, 24, 14, 2, 152000, True),
    "7b": Shape(*_TOWER, 3584, 18944, 28, 28, 4, 152128, False),
}


def tensor_shapes(s: Shape, vocab: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, by canonical name."""
    w, v = s.width, s.vision_width
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.embed_tokens.weight": (vocab, w),
        "decoder.norm.weight": (w,),
        "newline": (w,),
        "projector.linear_1.weight": (w, v),
        "projector.linear_1.bias": (w,),
        "projector.linear_2.weight": (w, w),
        "projector.linear_2.bias": (w,),
        "tower.embeddings.patch_embedding.weight": (v, 3, s.patch, s.patch),
        "tower.embeddings.patch_embedding.bias": (v,),
        "tower.embeddings.position_embedding.weight": ((s.image // s.patch) ** 2, v),
        "tower.post_layernorm.weight": (v,),
        "tower.post_layernorm.bias": (v,),
    }
    if not s.tied:
        shapes["head.weight"] = (vocab, w)
    for i in range(s.layers):
        shapes |= decoder_layer(f"decoder.layers.{i}.", w, s.width // s.heads * s.kv_heads, s.intermediate)
    for i in range(s.vision_layers):
        shapes |= {f"tower.encoder.layers.{i}.{k}": x for k, x in _vision_layer(s).items()}
    return shapes


def decoder_layer(prefix: str, width: int, kv_width: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a Qwen2 layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
        shapes |= {f"self_attn.{name}_proj.weight": (rows, width), f"self_attn.{name}_proj.bias": (rows,)}
    shapes |= {"self_attn.o_proj.weight": (width, width), "mlp.down_proj.weight": (width, intermediate)}
    shapes |= {f"mlp.{name}_proj.weight": (intermediate, width) for name in ("gate", "up")}
    shapes |= {f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def _vision_layer(s: Shape) -> dict[str, tuple[int, ...]]:
    v, m = s.vision_width, s.vision_intermediate
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.fc1.weight": (m, v),
        "mlp.fc1.bias": (m,),
        "mlp.fc2.weight": (v, m),
        "mlp.fc2.bias": (v,),
    }
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"self_attn.{name}.weight": (v, v), f"self_attn.{name}.bias": (v,)}
    for name in ("layer_norm1", "layer_norm2"):
        shapes |= {f"{name}.weight": (v,), f"{name}.bias": (v,)}
    return shapes


def siglip_shapes(s: Shape) -> dict[str, tuple[int, ...]]:
    """Shape of the tensors of the SigLIP checkpoint: one layer more than LLaVA keeps, and the pooling head."""
    v, m = s.vision_width, s.vision_intermediate
    tower = {k.replace("tower.", "vision_model."): x for k, x in tensor_shapes(s, 1).items() if k.startswith("tower.")}
    tower |= {f"vision_model.encoder.layers.{s.vision_layers}.{k}": x for k, x in _vision_layer(s).items()}
    head: dict[str, tuple[int, ...]] = {
        "probe": (1, 1, v), "attention.in_proj_weight": (3 * v, v), "attention.in_proj_bias": (3 * v,),
        "attention.out_proj.weight": (v, v), "attention.out_proj.bias": (v,), "layernorm.weight": (v,), "layernorm.bias": (v,),
        "mlp.fc1.weight": (m, v), "mlp.fc1.bias": (m,), "mlp.fc2.weight": (v, m), "mlp.fc2.bias": (v,),
    }  # fmt: skip
    text = {"logit_scale": (1,), "logit_bias": (1,), "text_model.final_layer_norm.weight": (v,)}
    return tower | {f"vision_model.head.{k}": x for k, x in head.items()} | text


def random_weights(
    shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random weights of a sensible scale: norms near 1, matrices that keep the variance, loud positions and colours."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("weight") and ("norm" in name or "ln_q" in name):
            weights[name] = 1 + 0.1 * noise
        elif name.endswith("bias") or name == "newline":
            weights[name] = 0.1 * noise
        elif name.endswith(("embed_tokens.weight", "position_embedding.weight")):
            weights[name] = 0.5 * noise
        else:
            fan_in = noise[0].numel() if noise.ndim > 1 else noise.numel()
            weights[name] = noise * fan_in**-0.5
        weights[name] = weights[name].to(dtype)  # now: of the 7B, fp32 would take 32 GB
    return weights


def plant_outliers(weights: dict[str, torch.Tensor], shape: Shape) -> None:
    """Gives the decoder what overflows in naive fp16: Qwen2's large key biases and its loud residual channel.

    In every head, key dimensions that rotate slowest are ±150 for every token and meet queries of ±300: the unscaled
    product is 90000. From the first layer on, channel 5 of the residual stream is 1e4.
    """
    head_dim = shape.width // shape.heads
    for name in [n for n in weights if n.endswith((".q_proj.bias", ".k_proj.bias")) and n.startswith("decoder.")]:
        bias, weight = weights[name].view(-1, head_dim), weights[name[:-4] + "weight"].view(-1, head_dim, shape.width)
        for dim, sign in ((head_dim // 2 - 1, 1), (head_dim - 1, -1)):
            bias[:, dim] = sign * (300.0 if ".q_proj." in name else 150.0)
            weight[:, dim] = 0.0
    weights["decoder.layers.0.self_attn.v_proj.bias"] += 20.0
    mix = weights["decoder.layers.0.self_attn.o_proj.weight"]
    mix -= mix.mean(1, keepdim=True)  # the values' bias reaches the loud channel alone
    mix[5] = 1e4 / (20.0 * shape.width)
    # As trained weights do, the norms behind it turn the loud channel down and the others up.
    for name in [n for n in weights if n.startswith("decoder.") and n.endswith("norm.weight")]:
        if name != "decoder.layers.0.input_layernorm.weight":
            weights[name] *= 1e4 * shape.width**-0.5
            weights[name][5] = 0.1


def make_tokenizer(lmms_lab: bool) -> Tokenizer:
    """A byte-level BPE like Qwen2's, with its special tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + ([] if lmms_lab else ["<image>", "<video>"])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def make(
    folder: Path,
    layout: str = "llava-hf",
    shape: Shape | None = None,
    *,
    seed: int = 0,
    outliers: bool = True,
    shards: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Path, Path]:
    """Writes a checkpoint and its SigLIP.

    Args:
        folder: Where.
        layout: One of LAYOUTS, or VIDEO_LAYOUT.
        shape: Dimensions; a small one by default.
        seed: Of the weights.
        outliers: Plant what overflows in naive fp16.
        shards: Files that the weights are spread over.
        dtype: Of LLaVA's tensors; by default what the layout's released files hold.

    Returns:
        The folders of the two.
    """
    shape = shape or Shape()
    llava, siglip = folder / "llava", folder / "siglip"
    lmms_lab = layout in ("lmms-lab", VIDEO_LAYOUT)
    tokenizer = make_tokenizer(lmms_lab)
    # padding rows past the tokenizer's ids, as the real tables have them
    vocab = shape.vocab or -(-tokenizer.get_vocab_size() // 64) * 64 + 64
    dtype = dtype or (torch.bfloat16 if lmms_lab else torch.float16)
    weights = random_weights(tensor_shapes(shape, vocab), seed, torch.float32 if outliers else dtype)
    weights["decoder.embed_tokens.weight"][:256] *= 0.1  # single bytes are quiet: what it babbles is words
    if outliers:
        plant_outliers(weights, shape)
    llava.mkdir(parents=True)
    siglip.mkdir()
    save_shards({_stored(name, layout): w.to(dtype).contiguous() for name, w in weights.items()}, llava, shards)
    save_shards(random_weights(siglip_shapes(shape), seed + 1), siglip, 1)
    _write_configs(llava, siglip, layout, shape, vocab, tokenizer)
    return llava, siglip


def _stored(name: str, layout: str) -> str:
    prefixes = PREFIXES[layout]
    prefix = next(p for p in prefixes if name.startswith(p))
    return prefixes[prefix] + name[len(prefix) :]


def save_shards(tensors: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """Writes tensors to one file, or to several with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names, index = sorted(tensors), dict[str, str]()
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def _write_configs(llava: Path, siglip: Path, layout: str, s: Shape, vocab: int, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(llava / "tokenizer.json"))
    token = tokenizer.token_to_id
    text = {
        "hidden_size": s.width, "intermediate_size": s.intermediate, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "vocab_size": vocab, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu", "use_sliding_window": False,
        "eos_token_id": token("<|im_end|>"), "bos_token_id": token("<|endoftext|>"),
    }  # fmt: skip
    vision = {
        "hidden_size": s.vision_width, "intermediate_size": s.vision_intermediate, "num_attention_heads": s.vision_heads,
        "image_size": s.image, "patch_size": s.patch, "model_type": "siglip_vision_model",
    }  # fmt: skip
    write_json(
        siglip / "config.json",
        {"model_type": "siglip", "vision_config": {**vision, "num_hidden_layers": s.vision_layers + 1}},
    )
    if layout in ("lmms-lab", VIDEO_LAYOUT):
        settings: dict[str, object] = {"mm_newline_position": "one_token"}
        if layout == VIDEO_LAYOUT:
            settings = {
                "mm_newline_position": "grid", "mm_spatial_pool_stride": 2, "add_time_instruction": True, "force_sample": True,
                "add_faster_video": False, "faster_token_stride": 10,
            }  # fmt: skip
        write_json(llava / "config.json", {
            **text, "architectures": ["LlavaQwenForCausalLM"], "model_type": "llava", "mm_vision_tower": "google/siglip-so400m-patch14-384",
            "mm_hidden_size": s.vision_width, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
            "mm_patch_merge_type": "spatial_unpad", "mm_spatial_pool_mode": "bilinear", **settings,
            "rope_scaling": None, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
        })  # fmt: skip
        stop: object = [token("<|im_end|>"), token("<|endoftext|>")]
    else:
        write_json(llava / "config.json", {
            "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
            "text_config": {**text, "model_type": "qwen2", "tie_word_embeddings": s.tied},
            "vision_config": {**vision, "num_hidden_layers": s.vision_layers, "vision_use_head": False},
            "image_token_index": token("<image>"), "video_token_index": token("<video>"), "tie_word_embeddings": False,
            "vision_feature_layer": -1, "vision_feature_select_strategy": "full", "projector_hidden_act": "gelu", "torch_dtype": "float16",
        })  # fmt: skip
        write_json(llava / "chat_template.json", {"chat_template": HF_TEMPLATE})
        stop = token("<|im_end|>")
    write_json(llava / "generation_config.json", {"eos_token_id": stop, "bos_token_id": token("<|endoftext|>")})
    write_json(
        llava / "tokenizer_config.json",
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    )


def write_json(file: Path, data: dict[str, object]) -> None:
    """Writes a JSON object."""
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=(*LAYOUTS, VIDEO_LAYOUT), default="llava-hf")
    parser.add_argument(
        "--size", choices=("small", *RELEASED), default="small", help="0.5b, 7b: the released shapes, filled at random"
    )
    args = parser.parse_args()
    shape = RELEASED.get(args.size, Shape())
    for made in make(args.folder, args.layout, shape, outliers=args.size == "small"):
        print(made)


if __name__ == "__main__":
    main()
