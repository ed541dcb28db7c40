"""Make a small Qwen2.5-VL checkpoint with random weights, in the format of a real one.

    python -m examples.make_qwen_checkpoint FOLDER [--layout hub | module] [--size small | 3b | 7b]

writes the same files, tensor names, prompt and geometry as the released checkpoints (patches of 14×14 pixels, tokens of
2×2 patches, windows of 112 pixels), scaled down in width and depth. It knows no facts and answers nonsense; it is there
so that every step can be run without a download.

The weights carry what makes real ones hard in fp16: key biases of ±150 and residual channels of 1e4 in the decoder, and
an MLP late in the tower that adds 2e5 to a channel.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer

from examples.make_checkpoint import (
    decoder_layer,
    make_tokenizer,
    plant_outliers,
    random_weights,
    save_shards,
    write_json,
)

#: Canonical prefix → prefix on disk.
PREFIXES = {
    # on the hub, and whatever today's transformers saves
    "hub": {"decoder.": "model.", "head.": "lm_head.", "tower.": "visual."},
    # the module names of transformers 4.52 and later, as a state_dict has them
    "module": {"decoder.": "model.language_model.", "head.": "lm_head.", "tower.": "model.visual."},
}

TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: In the order of the released tokenizer, of which these are the ones that a video's prompt has.
SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True)
class Shape:
    """Dimensions of a checkpoint; the defaults are a small one."""

    vision_width: int = 64
    vision_intermediate: int = 80
    vision_layers: int = 4
    vision_heads: int = 4
    whole_layers: tuple[int, ...] = (1, 3)
    width: int = 64
    intermediate: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    sections: tuple[int, int, int] = (2, 3, 3)
    vocab: int | None = None
    tied: bool = True


_TOWER = (1280, 3420, 32, 16, (7, 15, 23, 31))

#: The released ones, in full size.
RELEASED = {
    "3b": Shape(*_TOWER, 2048, 11008, 36, 16, 2, (16, 24, 24), 151936, True),
    "7b": Shape(*_TOWER, 3584, 18944, 28, 28, 4, (16, 24, 24), 152064, False),
}


def tensor_shapes(s: Shape, vocab: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, by canonical name."""
    w, v, joined = s.width, s.vision_width, 4 * s.vision_width
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.embed_tokens.weight": (vocab, w),
        "decoder.norm.weight": (w,),
        "tower.patch_embed.proj.weight": (v, 3, 2, 14, 14),
        "tower.merger.ln_q.weight": (v,),
        "tower.merger.mlp.0.weight": (joined, joined),
        "tower.merger.mlp.0.bias": (joined,),
        "tower.merger.mlp.2.weight": (w, joined),
        "tower.merger.mlp.2.bias": (w,),
    }
    if not s.tied:
        shapes["head.weight"] = (vocab, w)
    for i in range(s.layers):
        shapes |= decoder_layer(f"decoder.layers.{i}.", w, s.width // s.heads * s.kv_heads, s.intermediate)
    for i in range(s.vision_layers):
        p, m = f"tower.blocks.{i}.", s.vision_intermediate
        for name, rows, columns in (
            ("attn.qkv", 3 * v, v), ("attn.proj", v, v), ("mlp.gate_proj", m, v), ("mlp.up_proj", m, v), ("mlp.down_proj", v, m),
        ):  # fmt: skip
            shapes |= {f"{p}{name}.weight": (rows, columns), f"{p}{name}.bias": (rows,)}
        shapes |= {f"{p}norm{n}.weight": (v,) for n in (1, 2)}
    return shapes


def plant_tower_outliers(weights: dict[str, torch.Tensor], shape: Shape) -> None:
    """Gives the tower what overflows in fp16: the MLP of its last but one layer adds 2e5 to channel 7 of every patch.

    As trained weights do, the norms behind it turn the loud channel down and the others up.
    """
    p = f"tower.blocks.{shape.vision_layers - 2}.mlp."
    weights[p + "up_proj.bias"] += 4.0
    weights[p + "gate_proj.bias"] += 4.0
    weights[p + "down_proj.weight"][7] = 2e5 / (16 * shape.vision_intermediate)
    last = f"tower.blocks.{shape.vision_layers - 1}."
    for name in (last + "norm1.weight", last + "norm2.weight", "tower.merger.ln_q.weight"):
        weights[name] *= 2e5 * shape.vision_width**-0.5
        weights[name][7] = 0.1


def make_qwen_tokenizer() -> Tokenizer:
    """The tokenizer of the other small checkpoint with Qwen2.5-VL's special tokens behind."""
    tokenizer = make_tokenizer(lmms_lab=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def make(
    folder: Path,
    layout: str = "hub",
    shape: Shape | None = None,
    *,
    seed: int = 0,
    outliers: bool = True,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes a checkpoint into a new folder and returns it.

    Args:
        folder: Where.
        layout: One of PREFIXES.
        shape: Dimensions; a small one by default.
        seed: Of the weights.
        outliers: Plant what overflows in naive fp16.
        shards: Files that the weights are spread over.
        dtype: Of the tensors; the released files hold bfloat16.
    """
    shape, tokenizer = shape or Shape(), make_qwen_tokenizer()
    # padding rows past the tokenizer's ids, as the real tables have them
    vocab = shape.vocab or -(-tokenizer.get_vocab_size() // 64) * 64 + 64
    weights = random_weights(tensor_shapes(shape, vocab), seed, torch.float32 if outliers else dtype)
    weights["decoder.embed_tokens.weight"][:256] *= 0.1  # single bytes are quiet: what it babbles is words
    if outliers:
        plant_outliers(weights, shape)
        plant_tower_outliers(weights, shape)
    folder.mkdir(parents=True)
    save_shards({_stored(name, layout): w.to(dtype).contiguous() for name, w in weights.items()}, folder, shards)
    tokenizer.save(str(folder / "tokenizer.json"))
    token = tokenizer.token_to_id
    write_json(folder / "config.json", config(shape, vocab, tokenizer))
    write_json(folder / "chat_template.json", {"chat_template": TEMPLATE})
    stop = [token("<|im_end|>"), token("<|endoftext|>")]
    write_json(folder / "generation_config.json", {"eos_token_id": stop, "bos_token_id": token("<|endoftext|>")})
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    )
    return folder


def _stored(name: str, layout: str) -> str:
    prefixes = PREFIXES[layout]
    prefix = next(p for p in prefixes if name.startswith(p))
    return prefixes[prefix] + name[len(prefix) :]


def config(s: Shape, vocab: int, tokenizer: Tokenizer) -> dict[str, object]:
    """config.json as on the hub: the decoder's keys beside the others."""
    token = tokenizer.token_to_id
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "hidden_size": s.width, "intermediate_size": s.intermediate, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "vocab_size": vocab, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 128000, "hidden_act": "silu", "use_sliding_window": False,
        "sliding_window": 32768, "max_window_layers": s.layers, "tie_word_embeddings": s.tied, "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "mrope", "mrope_section": list(s.sections)},
        "bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>"),
        "vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>"),
        "vision_token_id": token("<|vision_pad|>"), "image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>"),
        "vision_config": {
            "depth": s.vision_layers, "hidden_act": "silu", "hidden_size": s.vision_width, "intermediate_size": s.vision_intermediate,
            "num_heads": s.vision_heads, "in_chans": 3, "out_hidden_size": s.width, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": list(s.whole_layers), "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small Qwen2.5-VL checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=PREFIXES, default="hub")
    parser.add_argument(
        "--size", choices=("small", *RELEASED), default="small", help="3b, 7b: the released shapes, filled at random"
    )
    args = parser.parse_args()
    shape = RELEASED.get(args.size, Shape())
    print(make(args.folder, args.layout, shape, outliers=args.size == "small"))


if __name__ == "__main__":
    main()
