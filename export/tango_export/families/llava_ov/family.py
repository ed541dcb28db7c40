"""LLaVA-OneVision as a family: its published checkpoints, its prompts, and how a checkpoint is opened."""

from __future__ import annotations

from pathlib import Path

import torch

from tango_export.checkpoint import Checkpoint
from tango_export.families.base import Family, Model, Preset
from tango_export.families.llava_ov.config import LlavaOvConfig, read_config
from tango_export.families.llava_ov.graphs import make_graphs
from tango_export.families.llava_ov.reference import LlavaOvReference
from tango_export.families.llava_ov.weights import LLAVA_RULES, SIGLIP_RULES, expected_shapes, renaming
from tango_export.modules.projector import pooled_side
from tango_export.modules.siglip import SiglipConfig
from tango_export.tokenizer import read_chat_template, read_tokenizer, stop_ids, vocabulary_size
from tango_plugins import PruneParams, TangoError
from tango_plugins.params import LLAVA_OV_GRID, LLAVA_OV_SINKS
from tango_runtime.bundle import DecoderSpec, VisionSpec
from tango_runtime.util.console import status

_SIGLIP = "google/siglip-so400m-patch14-384"

#: llava-hf's template as it is on the hub, for a checkpoint that was saved without one.
HF_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] if content['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ '\\n' + content['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: lmms-lab's conversation `qwen_1_5`; one <image> stands for the whole video.
QWEN_1_5_TEMPLATE = (
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for content in message['content'] if content['type'] == 'video' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load(checkpoint_folder: Path, siglip_folder: Path, dtype: torch.dtype, context: int) -> Model:
    """Opens a checkpoint; reads names and shapes, not yet the weights.

    Args:
        checkpoint_folder: LLaVA-OneVision, in either format.
        siglip_folder: The SigLIP that its tower was made from; it holds the pooling head.
        dtype: Of the graphs' weights and features.
        context: Most positions.

    Raises:
        TangoError: Something is missing, misshapen, unknown or not supported; the message names it.
    """
    head = _pooling_head(siglip_folder)
    config = read_config(checkpoint_folder, siglip_folder)
    if not 1 <= context <= config.text.max_position_embeddings:
        raise TangoError(
            f"--context is {context}, the decoder was made for 1 to {config.text.max_position_embeddings} positions",
            f"give at most --context {config.text.max_position_embeddings}",
        )
    checkpoint = Checkpoint(checkpoint_folder, renaming(LLAVA_RULES))
    checkpoint.check(expected_shapes(config), optional=["lm_head.weight"] if config.tied else [])
    _check_pooling_head(head, config.vision)
    tokenizer_json, tokenizer = read_tokenizer(checkpoint_folder)
    vocabulary = vocabulary_size(tokenizer)
    if vocabulary > config.text.vocab_size:
        raise TangoError(
            f"{checkpoint_folder}: the tokenizer has {vocabulary} ids, the table {config.text.vocab_size} rows",
            "tokenizer and weights are not of the same checkpoint; download it again",
        )
    text, side = config.text, pooled_side(config.vision.side)
    return Model(
        graphs=make_graphs(config, checkpoint, head, dtype, vocabulary),
        params=PruneParams(grid=(side, side), sink_positions=attention_sinks(side)),
        size=config.vision.image_size,
        tokens_per_frame=side**2,
        placeholder="<image>" if config.lmms_lab else "<video>",
        after_video=(text.vocab_size,),
        chat_template=QWEN_1_5_TEMPLATE if config.lmms_lab else _hf_template(checkpoint_folder),
        tokenizer=tokenizer_json,
        stop=stop_ids(checkpoint_folder, tokenizer, config.eos),
        vocabulary=vocabulary,
        vision=_vision_spec(config),
        decoder=DecoderSpec(
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            context=context,
            norm_eps=text.rms_norm_eps,
        ),
        reference=lambda: LlavaOvReference(config.vision, config.text, checkpoint, head),
    )


def _vision_spec(config: LlavaOvConfig) -> VisionSpec:
    tower, width = config.vision, config.text.hidden_size
    return VisionSpec(
        layers=tower.num_hidden_layers,
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        heads=tower.num_attention_heads,
        patches=tower.side**2,
        projector=(tower.hidden_size * width, width**2),
        mlp="plain",
    )


def attention_sinks(side: int) -> tuple[int, ...]:
    """Positions of SigLIP's attention sinks in a token grid of that side: those of the released 14×14 grid, else none.

    Source: the code of Tango's authors.
    """
    return LLAVA_OV_SINKS if (side, side) == LLAVA_OV_GRID else ()


def _pooling_head(folder: Path) -> Checkpoint:
    head = Checkpoint(folder, renaming(SIGLIP_RULES))
    for name in ("probe", "attention.in_proj_weight", "attention.in_proj_bias"):
        if f"head.{name}" not in head:
            raise TangoError(
                f"{folder} has no SigLIP pooling head (vision_model.head.{name}), which the salience comes from",
                f"LLaVA checkpoints do not hold it: give the original SigLIP checkpoint, --siglip {_SIGLIP}",
            )
    return head


def _check_pooling_head(head: Checkpoint, vision: SiglipConfig) -> None:
    width = vision.hidden_size
    shapes = {
        "probe": (1, 1, width),
        "attention.in_proj_weight": (3 * width, width),
        "attention.in_proj_bias": (3 * width,),
    }
    for name, shape in shapes.items():
        if head.shape(f"head.{name}") != shape:
            raise TangoError(
                f"{head.folder}: head.{name} has shape {list(head.shape(f'head.{name}'))}, "
                f"the tower asks for {list(shape)}",
                "give the SigLIP that this checkpoint's tower was made from",
            )


def _hf_template(folder: Path) -> str:
    template = read_chat_template(folder)
    if template is None:
        status(f"{folder} has no chat template; llava-hf's is used")
    return template or HF_TEMPLATE


FAMILY = Family(
    name="llava-ov",
    presets={
        "llava-ov": Preset("llava-ov-0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", _SIGLIP),
        "llava-ov-0.5b": Preset("llava-ov-0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", _SIGLIP),
        "llava-ov-7b": Preset("llava-ov-7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf", _SIGLIP),
    },
    load=load,
)
