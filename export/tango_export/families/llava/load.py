"""Opens a LLaVA checkpoint for a family that is described by a :class:`Variant`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tango_export.checkpoint import Checkpoint, read_packing, renaming
from tango_export.families.base import Model, Reference
from tango_export.families.llava.config import Formats, LlavaConfig, read_config
from tango_export.families.llava.graphs import MEAN_AND_STD, definitions
from tango_export.families.llava.templates import HF_TEMPLATE, QWEN_1_5_TEMPLATE
from tango_export.families.llava.weights import LLAVA_RULES, SIGLIP_RULES
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
from tango_export.graph import Definition
from tango_export.models.projector import Pooling, PoolingMode
from tango_export.tokenizer import read_tokenizer, stop_ids
from tango_plugins import PruneParams, TangoError
from tango_runtime.bundle import InnerPruning, PromptSpec, VideoSpec, VisionSpec


@dataclass(frozen=True)
class Variant:
    """What tells one LLaVA family from another.

    Attributes:
        formats: How its config.json is known.
        siglip: Hub id of the SigLIP that its towers were made from.
        pooling: How the tower's patches become tokens.
        frames: Frames sampled by default.
        sinks: Grid positions of the tower's attention sinks, by token grid; a grid that is not listed has none.
        video_text: Text between the video and the question; see :class:`tango_runtime.bundle.PromptSpec`.
    """

    formats: Formats
    siglip: str
    pooling: PoolingMode
    frames: int
    sinks: Mapping[tuple[int, int], tuple[int, ...]]
    video_text: str | None = None


def load(variant: Variant, folders: Mapping[str, Path], context: int, inner: InnerPruning | None = None) -> Model:
    """Opens a checkpoint; reads names and shapes, not yet the weights.

    Args:
        variant: The family.
        folders: ``checkpoint``: LLaVA, in either format; ``salience``: the SigLIP with the pooling head.
        context: Most positions.
        inner: Which of the video's rows the decoder drops on its way.

    Raises:
        TangoError: Something is missing, misshapen, unknown or not supported; the message names it.
    """
    folder = folders["checkpoint"]
    head = _pooling_head(folders.get("salience", folder), variant.siglip)
    config = read_config(folder, head.folder, variant.formats)
    text, pooling = config.text, Pooling(variant.pooling, config.vision.side)
    grid, newline = (pooling.side,) * 2, text.vocab_size  # the newline's row follows the vocabulary
    check_context(context, text.max_position_embeddings)
    if not config.lmms_lab:  # whose code reads none of these files
        check_processor(folder, *[(MEAN_AND_STD,) * 3] * 2)
    if inner and not 0 < inner.layer < text.num_hidden_layers:
        raise TangoError(
            f"--inner-layer is {inner.layer}, the decoder has {text.num_hidden_layers} layers",
            f"give one from 1 to {text.num_hidden_layers - 1}",
        )
    tokenizer_json, tokenizer = read_tokenizer(folder)
    vocabulary = read_vocabulary(folder, tokenizer, text.vocab_size)
    checkpoint = Checkpoint(folder, renaming(LLAVA_RULES), read_packing(folder))
    tied = config.tied and "lm_head.weight" not in checkpoint
    graphs = definitions(config, pooling, context, vocabulary, tied, inner)
    _check_weights(graphs, checkpoint, head)
    return Model(
        definitions=graphs,
        config={"vision": asdict(config.vision), "text": asdict(config.text)},
        read=lambda name: (head if name.startswith("head.") else checkpoint).read(name),
        params=PruneParams(
            grid=grid,
            sink_positions=variant.sinks.get(grid, ()),
            decoder_share=inner.share(text.num_hidden_layers) if inner else 1.0,
        ),
        video=VideoSpec(
            frames=variant.frames,
            size=(config.vision.image_size,) * 2,
            resample="bicubic",
            tokens_per_frame=pooling.side**2,
            frames_per_step=1,
            sampling="floor",
        ),
        prompt=PromptSpec(
            placeholder="<image>" if config.lmms_lab else "<video>",
            after_video=(newline,) if variant.formats.newline == "one_token" else (),
            stop=stop_ids(folder, tokenizer, config.eos, STOP_TOKENS),
            vocabulary=vocabulary,
            row_end=newline if variant.formats.newline == "grid" else None,
            video_text=variant.video_text,
        ),
        vision=_vision_spec(config),
        decoder=replace(decoder_spec(text, context), inner=inner),
        chat_template=QWEN_1_5_TEMPLATE if config.lmms_lab else chat_template(folder, HF_TEMPLATE, "llava-hf's"),
        tokenizer=tokenizer_json,
        reference=_reference(config, pooling, checkpoint, head),
        packed=packed_layers(checkpoint),
    )


def _vision_spec(config: LlavaConfig) -> VisionSpec:
    tower, width = config.vision, config.text.hidden_size
    return VisionSpec(
        layers=tower.num_hidden_layers,
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        heads=tower.num_attention_heads,
        patches=tower.patches,
        projector=(tower.hidden_size * width, width**2),
        mlp="plain",
    )


def _reference(
    config: LlavaConfig, pooling: Pooling, checkpoint: Checkpoint, head: Checkpoint
) -> Callable[[], Reference]:
    def made() -> Reference:
        from tango_export.families.llava.reference import LlavaReference

        return LlavaReference(config.vision, config.text, pooling.mode, checkpoint, head)

    return made


def _pooling_head(folder: Path, siglip: str) -> Checkpoint:
    head = Checkpoint(folder, renaming(SIGLIP_RULES))
    for name in ("probe", "attention.in_proj_weight", "attention.in_proj_bias"):
        if f"head.{name}" not in head:
            raise TangoError(
                f"{folder} has no SigLIP pooling head (vision_model.head.{name}), which the salience comes from",
                f"LLaVA checkpoints do not hold it: give the original SigLIP, --salience-checkpoint {siglip}",
            )
    return head


def _check_weights(graphs: tuple[Definition, ...], checkpoint: Checkpoint, head: Checkpoint) -> None:
    expected = expected_tensors(graphs)
    for name in [name for name in expected if name.startswith("head.")]:
        shape = expected.pop(name)
        if head.shape(name) != shape:
            raise TangoError(
                f"{head.folder}: {name} has shape {list(head.shape(name))}, the tower needs {list(shape)}",
                "give the SigLIP that this checkpoint's tower was made from",
            )
        head.check_dtype(name)
    checkpoint.check(expected)
