"""What a model family says of itself: data and a function that opens a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tango_export.graph.blocks import PackedLayers
from tango_export.graph.builder import Array, Definition, Read
from tango_plugins import PruneParams
from tango_runtime.bundle import Config, DecoderSpec, InnerPruning, Manifest, PromptSpec, VideoSpec, VisionSpec


@dataclass(frozen=True)
class Preset:
    """A published checkpoint.

    Attributes:
        bundle: What a bundle of it is called.
        checkpoint: Its id on the hub.
        salience: Id of the checkpoint whose pooling head gives the salience; None where it does so itself.
    """

    bundle: str
    checkpoint: str
    salience: str | None = None


class Reference(Protocol):
    """The original model in fp32, which validation compares with."""

    def vision(self, frames: Array) -> tuple[Array, Array]:
        """What the vision graph takes, uint8 → features [F, L, D] and salience [F, L]."""

    def embed(self, ids: Array) -> Array:
        """[N] int64 → [N, D], special rows included."""

    def logits(self, embeddings: Array, rotary: Array | None) -> Array:
        """[N, D] → logits of every position [N, vocabulary].

        ``rotary`` are positions on three axes [3, N] int64, None where the decoder has none.
        """


@dataclass(frozen=True)
class Model:
    """An opened checkpoint, ready to be exported. Weights are read when they are written.

    Attributes:
        definitions: The vision, embedding and decoder graphs.
        config: What the definitions depend on, in the words of config.json; it goes into bundle.json.
        read: Reads a tensor by its canonical name.
        params: The operator's parameters for this model: its token grid and its attention sinks, else the defaults.
        video: How a video becomes frames.
        prompt: How a question becomes token ids.
        vision: The vision tower's dimensions.
        decoder: The decoder's dimensions.
        chat_template: The checkpoint's own, as Jinja.
        tokenizer: The tokenizer.json, as text.
        reference: Loads the original model; needs torch and transformers.
        packed: The layers that the checkpoint stores in 4 bits; None where there are none.
    """

    definitions: tuple[Definition, ...]
    config: Config
    read: Read
    params: PruneParams
    video: VideoSpec
    prompt: PromptSpec
    vision: VisionSpec
    decoder: DecoderSpec
    chat_template: str
    tokenizer: str
    reference: Callable[[], Reference]
    packed: PackedLayers | None = None


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: What ``--model`` calls it.
        presets: Its published checkpoints, by what ``--model`` calls them; the family's own name is among them.
        load: Opens the folders ``checkpoint`` and, where one is named, ``salience``, for a context of this many
            positions, and with inner pruning where it is given; reads names and shapes, not yet the weights.
        definitions: The graphs of a bundle, from its bundle.json. Their weights are the bundle's.
        context: Positions by default: a prompt with all tokens of a video, and an answer.
    """

    name: str
    presets: Mapping[str, Preset]
    load: Callable[[Mapping[str, Path], int, InnerPruning | None], Model]
    definitions: Callable[[Manifest], tuple[Definition, ...]]
    context: int = 8192
