"""Opens a Qwen2.5-VL checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from tokenizers import Tokenizer

from tango_export.checkpoint import Checkpoint, read_packing, renaming
from tango_export.families.base import Model, Reference
from tango_export.families.opening import (
    STOP_TOKENS,
    chat_template,
    check_context,
    decoder_spec,
    expected_tensors,
    packed_layers,
    read_vocabulary,
)
from tango_export.families.processor import check_processor
from tango_export.families.qwen25_vl.config import QwenConfig, read_config
from tango_export.families.qwen25_vl.graphs import definitions
from tango_export.models.qwen_vision import MEAN, STD
from tango_export.tokenizer import read_tokenizer, stop_ids
from tango_plugins import PruneParams, TangoError
from tango_runtime.bundle import InnerPruning, PixelBudget, PromptSpec, RotarySpec, VideoSpec, VisionSpec

#: Names on disk, in any layout, → canonical names; the first rule that matches. None leaves a tensor out.
RULES = [
    (r".*inv_freq$", None),
    (r"(model\.)?visual\.", "tower."),
    (r"(model\.)?language_model\.(model\.)?", "decoder."),
    (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "decoder."),
]

#: The released checkpoints' template, as far as a video and text need it.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'video' %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

PLACEHOLDER = "<|video_pad|>"

#: Default number of frames, and the size that 16:9 frames have within the budget of that many.
FRAMES, SIZE = 32, (560, 1008)

#: Pixels of a frame, and of all frames, a token being 784 of them: qwen-vl-utils, vision_process.py, 0.0.11 and later.
BUDGET = PixelBudget(factor=28, min_pixels=128 * 784, max_pixels=768 * 784, total_pixels=int(128000 * 784 * 0.9))

#: Rows and columns of a frame's tokens at that size.
GRID = (SIZE[0] // BUDGET.factor, SIZE[1] // BUDGET.factor)


def load(folders: Mapping[str, Path], context: int, inner: InnerPruning | None = None) -> Model:
    """Opens a checkpoint; reads names and shapes, not yet the weights.

    Args:
        folders: ``checkpoint``, in any layout.
        context: Most positions.
        inner: Not for this decoder.

    Raises:
        TangoError: Something is missing, misshapen, unknown or not supported; the message names it.
    """
    if inner is not None:
        raise TangoError("Qwen2.5-VL's decoder has no inner pruning", "leave --inner-layer out")
    folder = folders["checkpoint"]
    config = read_config(folder)
    text = config.text
    check_context(context, text.max_position_embeddings)
    check_processor(folder, MEAN, STD)
    tokenizer_json, tokenizer = read_tokenizer(folder)
    _check_tokens(folder, tokenizer)
    vocabulary = read_vocabulary(folder, tokenizer, text.vocab_size)
    checkpoint = Checkpoint(folder, renaming(RULES), read_packing(folder))
    graphs = definitions(config, context, vocabulary, tied=config.tied and "lm_head.weight" not in checkpoint)
    checkpoint.check(expected_tensors(graphs))
    return Model(
        definitions=graphs,
        config={"vision": asdict(config.vision), "text": asdict(config.text)},
        read=checkpoint.read,
        params=PruneParams(grid=GRID, sink_positions=()),
        video=VideoSpec(
            frames=FRAMES,
            size=SIZE,
            resample="bicubic",
            tokens_per_frame=math.prod(GRID),
            frames_per_step=2,
            sampling="nearest",
            budget=BUDGET,
        ),
        prompt=PromptSpec(
            placeholder=PLACEHOLDER,
            after_video=(),
            stop=stop_ids(folder, tokenizer, config.eos, STOP_TOKENS),
            vocabulary=vocabulary,
        ),
        vision=_vision_spec(config),
        decoder=replace(decoder_spec(text, context), rotary=_rotary(config)),
        chat_template=chat_template(folder, TEMPLATE, "the released checkpoints'"),
        tokenizer=tokenizer_json,
        reference=_reference(config, checkpoint),
        packed=packed_layers(checkpoint),
    )


def _vision_spec(config: QwenConfig) -> VisionSpec:
    tower = config.vision
    joined = tower.hidden_size * tower.spatial_merge_size**2  # the patches of a token, side by side
    return VisionSpec(
        layers=tower.depth,
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        heads=tower.num_heads,
        patches=math.prod(GRID) * tower.spatial_merge_size**2,
        projector=(0, joined * (joined + tower.out_hidden_size)),
        mlp="gated",
        global_layers=len(tower.fullatt_block_indexes),
        window=tower.window**2,
    )


def _rotary(config: QwenConfig) -> RotarySpec:
    return RotarySpec(
        sections=config.text.mrope_section,
        time_step="seconds",
        tokens_per_second=config.tokens_per_second,
        positions=config.text.max_position_embeddings,
    )


def _check_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    for token in ("<|vision_start|>", PLACEHOLDER, "<|vision_end|>"):
        if tokenizer.token_to_id(token) is None:
            raise TangoError(
                f"{folder}: the tokenizer has no {token}", "take tokenizer.json from the checkpoint on the hub"
            )


def _reference(config: QwenConfig, checkpoint: Checkpoint) -> Callable[[], Reference]:
    def made() -> Reference:
        from tango_export.families.qwen25_vl.reference import QwenReference

        return QwenReference(config, checkpoint)

    return made
