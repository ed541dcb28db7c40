"""LLaVA as transformers has it, in fp32: the golden reference of validation. Needs torch and transformers.

transformers has classes for LLaVA-OneVision. LLaVA-Video is the same but for the pooling, which is replaced.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.utils import logging

from tango_export.checkpoint import Checkpoint
from tango_export.graph.builder import Array
from tango_export.models.qwen2 import Qwen2Config
from tango_export.models.siglip import SiglipConfig

#: Canonical prefixes → those of transformers' modules (5.6 and later).
_MODULES = {
    "tower.": "model.vision_tower.",
    "projector.": "model.multi_modal_projector.",
    "decoder.": "model.language_model.",
    "newline": "model.image_newline",
    "lm_head.": "lm_head.",
}


class LlavaReference:
    """transformers' LlavaOnevisionForConditionalGeneration and SigLIP's pooling head, on the CPU in fp32.

    Args:
        vision: The tower's dimensions.
        text: The decoder's dimensions.
        pooling: ``bilinear`` as LLaVA-OneVision, ``average`` as LLaVA-Video.
        checkpoint: LLaVA's tensors by canonical name.
        head: SigLIP's pooling head.
    """

    def __init__(
        self,
        vision: SiglipConfig,
        text: Qwen2Config,
        pooling: Literal["bilinear", "average"],
        checkpoint: Checkpoint,
        head: Checkpoint,
    ) -> None:
        logging.disable_progress_bar()  # the caller shows one of its own
        tied = "lm_head.weight" not in checkpoint
        config = LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **asdict(vision)},
            text_config={"model_type": "qwen2", "tie_word_embeddings": tied, **_text_config(text)},
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
        state = {_module_name(name): _fp32(checkpoint, name) for name in checkpoint}
        self._model: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32
        ).eval()
        if pooling == "average":
            self._model.model.apply_pooling = _average_pooling
        self._newline = _fp32(checkpoint, "newline")
        self._pooling = _pooling_attention(head, vision)

    @torch.no_grad()
    def vision(self, frames: Array) -> tuple[Array, Array]:
        """Uint8 [F, size, size, 3] → features [F, L, D] and salience [F, L]."""
        pixels = ((torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255) - 0.5) / 0.5
        model = self._model.model
        features = model.get_video_features(
            pixels[None], vision_feature_layer=-1, vision_feature_select_strategy="full"
        )
        tower = model.vision_tower
        patches = tower.post_layernorm(tower(pixels, output_hidden_states=True).hidden_states[-1])
        attention, probe = self._pooling
        weights = attention(probe.expand(len(frames), -1, -1), patches, patches, need_weights=True)[1]
        salience = model.apply_pooling(weights.transpose(1, 2)).squeeze(-1)
        rows = features.pooler_output.flatten(0, -2)[: salience.numel()]  # 5.18 and later give the newline, too
        return rows.reshape(*salience.shape, -1).numpy(), salience.numpy()

    @torch.no_grad()
    def embed(self, ids: Array) -> Array:
        """[N] int64 → [N, D]; the newline is the row after the vocabulary."""
        table = self._model.get_input_embeddings().weight
        rows: Array = torch.cat((table, self._newline[None]))[torch.from_numpy(ids)].numpy()
        return rows

    @torch.no_grad()
    def logits(self, embeddings: Array, rotary: Array | None = None) -> Array:
        """[N, D] → logits of every position [N, vocabulary]; it takes no ``rotary``."""
        given = torch.from_numpy(embeddings.astype(np.float32))
        logits: Array = self._model(inputs_embeds=given[None]).logits[0].numpy()
        return logits


def _average_pooling(x: torch.Tensor) -> torch.Tensor:
    """[F, patches, D] → [F, tokens, D]: LLaVA-NeXT's ``avg_pool2d(x, 2)`` on the grid of patches."""
    side = round(x.shape[1] ** 0.5)
    grid = x.transpose(1, 2).reshape(len(x), -1, side, side)
    return torch.nn.functional.avg_pool2d(grid, 2).flatten(-2).transpose(1, 2)


def _text_config(text: Qwen2Config) -> dict[str, Any]:
    values = asdict(text)
    theta = values.pop("rope_theta")
    return values | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _module_name(name: str) -> str:
    prefix = next(prefix for prefix in _MODULES if name.startswith(prefix))
    return _MODULES[prefix] + name[len(prefix) :]


def _fp32(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return torch.from_numpy(checkpoint.read(name).astype(np.float32))


def _pooling_attention(head: Checkpoint, vision: SiglipConfig) -> tuple[torch.nn.MultiheadAttention, torch.Tensor]:
    attention = torch.nn.MultiheadAttention(vision.hidden_size, vision.num_attention_heads, batch_first=True)
    # The output projection stays as it was made: the weights of the attention do not depend on it.
    state = {name: _fp32(head, f"head.attention.{name}") for name in ("in_proj_weight", "in_proj_bias")}
    attention.load_state_dict(state, strict=False)
    return attention.eval(), _fp32(head, "head.probe")
