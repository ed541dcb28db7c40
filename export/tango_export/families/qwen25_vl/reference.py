"""Qwen2.5-VL as transformers has it, in fp32: the golden reference of validation. Needs torch and transformers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from tango_export.checkpoint import Checkpoint
from tango_export.families.qwen25_vl.config import QwenConfig
from tango_export.graph.builder import Array
from tango_export.models.qwen_vision import MEAN, STD, QwenVisionConfig

#: Canonical prefixes → those of transformers' modules (4.52 and later).
_MODULES = {"tower.": "model.visual.", "decoder.": "model.language_model.", "lm_head.": "lm_head."}


class QwenReference:
    """transformers' Qwen2_5_VLForConditionalGeneration on the CPU in fp32, and the salience of its tower's last layer.

    Args:
        config: Dimensions.
        checkpoint: The tensors by canonical name.
    """

    def __init__(self, config: QwenConfig, checkpoint: Checkpoint) -> None:
        logging.disable_progress_bar()  # the caller shows one of its own
        self._vision, tied = config.vision, "lm_head.weight" not in checkpoint
        state = {_module_name(name): torch.from_numpy(checkpoint.read(name).astype(np.float32)) for name in checkpoint}
        self._model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            None,
            config=Qwen2_5_VLConfig(
                text_config=_text_config(config) | {"tie_word_embeddings": tied},
                vision_config=_vision_config(config),
                tie_word_embeddings=tied,
                attn_implementation="eager",
            ),
            state_dict=state,
            dtype=torch.float32,
        ).eval()

    @torch.no_grad()
    def vision(self, frames: Array) -> tuple[Array, Array]:
        """Steps of two frames, uint8 [F, 2, H, W, 3] → features [F, L, D] and salience [F, L]."""
        rows, columns = (n // self._vision.patch_size for n in frames.shape[2:4])
        tower, taken = self._model.model.visual, dict[str, Any]()
        last = tower.blocks[-1].attn
        hooks = [
            last.qkv.register_forward_hook(lambda module, given, result: taken.update(qkv=result)),
            last.register_forward_pre_hook(
                lambda module, given, named: taken.update(angles=named["position_embeddings"]), with_kwargs=True
            ),
        ]
        grid = torch.tensor([[len(frames), rows, columns]])
        features = tower(_patches(frames, self._vision), grid_thw=grid).pooler_output
        for hook in hooks:
            hook.remove()
        salience = _salience(taken["qkv"], taken["angles"], self._vision, len(frames))
        order = _window_order(rows, columns, self._vision)
        salience = salience[:, np.argsort(order)]
        return features.reshape(*salience.shape, -1).numpy(), salience.numpy()

    @torch.no_grad()
    def embed(self, ids: Array) -> Array:
        """[N] int64 → [N, D]."""
        rows: Array = self._model.get_input_embeddings().weight[torch.from_numpy(ids)].numpy()
        return rows

    @torch.no_grad()
    def logits(self, embeddings: Array, rotary: Array | None) -> Array:
        """[N, D] at ids [3, N] → logits of every position [N, vocabulary].

        transformers never computes the ids: 4.57 and 5.17 cut seconds to integers and number the text wrongly.
        """
        assert rotary is not None
        given = torch.from_numpy(embeddings.astype(np.float32))
        logits: Array = (
            self._model(inputs_embeds=given[None], position_ids=torch.from_numpy(rotary)[:, None]).logits[0].numpy()
        )
        return logits


def _salience(
    qkv: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], c: QwenVisionConfig, steps: int
) -> torch.Tensor:
    """Attention that each token receives from the mean query of its step, [F, L], tokens in the tower's order."""
    merged = c.spatial_merge_size**2
    query, key, _ = qkv.reshape(len(qkv), 3, c.num_heads, -1).unbind(1)
    cos, sin = (part[:, None] for part in angles)
    query, key = (
        x * cos + torch.cat((-x[..., c.head_dim // 2 :], x[..., : c.head_dim // 2]), -1) * sin for x in (query, key)
    )
    query = query.reshape(steps, -1, c.num_heads, c.head_dim).mean(1)
    key = key.reshape(steps, -1, merged, c.num_heads, c.head_dim).mean(2)
    scores = torch.einsum("thd,tlhd->thl", query, key) * c.head_dim**-0.5
    return torch.mean(scores.softmax(-1), 1)


def _window_order(rows: int, columns: int, c: QwenVisionConfig) -> Array:
    """The tokens of a grid of patches in the tower's order, window by window, [L]."""
    side = c.window // c.spatial_merge_size
    row, column = np.indices((rows // c.spatial_merge_size, columns // c.spatial_merge_size)) // side
    return np.argsort(row.ravel() * columns + column.ravel(), kind="stable")


def _patches(frames: Array, c: QwenVisionConfig) -> torch.Tensor:
    """What the tower takes of steps [F, 2, H, W, 3]: a vector for each patch, those of a token one after the other."""
    pixels = (torch.from_numpy(frames).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    steps, pair, height, width, _ = pixels.shape
    size, side = c.patch_size, c.spatial_merge_size
    rows, columns = height // size // side, width // size // side
    split = pixels.reshape(steps, pair, rows, side, size, columns, side, size, 3)
    return split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * pair * size**2)


def _text_config(config: QwenConfig) -> dict[str, Any]:
    values = asdict(config.text)
    rope = {"rope_theta": values.pop("rope_theta"), "mrope_section": list(values.pop("mrope_section"))}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"))  # of no use here, and a small vocabulary has others
    return values | ids | {"rope_parameters": {"rope_type": "default", **rope}}


def _vision_config(config: QwenConfig) -> dict[str, Any]:
    values = asdict(config.vision) | {"tokens_per_second": config.tokens_per_second}
    return values | {"fullatt_block_indexes": list(config.vision.fullatt_block_indexes)}


def _module_name(name: str) -> str:
    prefix = next(prefix for prefix in _MODULES if name.startswith(prefix))
    return _MODULES[prefix] + name[len(prefix) :]
