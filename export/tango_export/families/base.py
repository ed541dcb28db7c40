"""What a model family says of itself: data and a few functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tango_export.graphs import Graph
from tango_plugins import PruneParams
from tango_runtime.bundle import DecoderSpec, VisionSpec


@dataclass(frozen=True)
class Preset:
    """A published checkpoint: ids on the hub, and what a bundle of it is called."""

    bundle: str
    checkpoint: str
    siglip: str


class Reference(Protocol):
    """The original model, as the golden reference of validation."""

    def vision(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Uint8 [F, size, size, 3] → features [F, L, D] and salience [F, L], both fp32."""

    def embed(self, ids: Tensor) -> Tensor:
        """[N] int64 → [N, D] fp32, special rows included."""

    def logits(self, embeddings: Tensor) -> Tensor:
        """[N, D] → logits of every position [N, vocabulary] fp32."""


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint, ready to be written. Weights are read when they are needed.

    Attributes:
        graphs: The vision, embedding and decoder graphs.
        params: The operator's parameters for this family's token grid, at their defaults.
        size: Edge of a frame, in pixels.
        tokens_per_frame: Tokens of one frame, L.
        placeholder: What stands for the video in a rendered prompt.
        after_video: Rows of the embedding graph that follow the video's tokens.
        chat_template: The checkpoint's own, as Jinja.
        tokenizer: The tokenizer.json, as text.
        stop: Token ids that end an answer.
        vocabulary: Ids that the tokenizer knows.
        vision: The vision tower's dimensions.
        decoder: The decoder's dimensions.
        reference: Makes the original model.
    """

    graphs: tuple[Graph, ...]
    params: PruneParams
    size: int
    tokens_per_frame: int
    placeholder: str
    after_video: tuple[int, ...]
    chat_template: str
    tokenizer: str
    stop: tuple[int, ...]
    vocabulary: int
    vision: VisionSpec
    decoder: DecoderSpec
    reference: Callable[[], Reference]


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: What ``--model`` calls it.
        presets: Its published checkpoints, by what ``--model`` calls them; the family's own name is among them.
        load: Opens a checkpoint folder and a SigLIP folder, with a dtype and a context.
    """

    name: str
    presets: dict[str, Preset]
    load: Callable[[Path, Path, torch.dtype, int], Model]
