"""The model: SigLIP, projector and Qwen2 of transformers, sized to 15 MB, and its forward passes in training.

Letters: B clips, F frames, L = 196 tokens per frame, V video tokens of a clip, Q questions of a clip, T text tokens of one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)
from transformers.models.siglip.configuration_siglip import SiglipConfig

SIZE, PATCH, SIDE, POOLED_SIDE = 384, 14, 27, 14

#: Tokens of a phrase, padding included.
PHRASE = 16

_VISION = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 5, "num_attention_heads": 6, "image_size": SIZE, "patch_size": PATCH,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
_DECODER = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "use_sliding_window": False,
}  # fmt: skip


def make_siglip(vocabulary: int) -> SiglipModel:
    """Stage 1: a tower with its pooling head, and a small text encoder that is discarded afterwards."""
    text = SiglipTextConfig(
        vocab_size=vocabulary, hidden_size=_VISION["hidden_size"], intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=6, max_position_embeddings=PHRASE, projection_size=_VISION["hidden_size"],
    )  # fmt: skip
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=SiglipVisionConfig(**_VISION).to_dict()))
    nn.init.constant_(model.logit_scale, 2.3)  # SigLIP's t' = log 10
    nn.init.constant_(model.logit_bias, -5.0)  # higher than its -10: a phrase is true of more frames than a caption
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight.copy_(0.5 * position_grid(SIDE, _VISION["hidden_size"]))
    return model


def position_grid(side: int, width: int) -> Tensor:
    """Initial position embeddings: sines and cosines of a grid's rows and columns, fp32 [side·side, width].

    With random ones, such a short training hardly learns where things are.
    """
    rates = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    line = torch.cat((angles.sin(), angles.cos()), 1)
    return torch.cat((line.repeat_interleave(side, 0), line.repeat(side, 1)), 1)


def make_llava(
    vocabulary: int, video_token: int, image_token: int, end_token: int
) -> LlavaOnevisionForConditionalGeneration:
    """Stage 2: the whole model."""
    text = Qwen2Config(vocab_size=vocabulary, eos_token_id=end_token, bos_token_id=None, **_DECODER)
    vision = SiglipVisionConfig(vision_use_head=False, **_VISION)
    config = LlavaOnevisionConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=image_token, video_token_index=video_token,
        vision_feature_layer=-1, vision_feature_select_strategy="full", projector_hidden_act="gelu", tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaOnevisionForConditionalGeneration(config)
    for name, weight in model.model.named_parameters():
        if weight.ndim == 2 and name.startswith(("language_model", "multi_modal_projector")):
            # Keeps the variance; transformers' 0.02 suits widths of thousands. Layers that add to the residual are smaller.
            scale = (
                (2 * text.num_hidden_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            )
            nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)
    nn.init.normal_(model.model.image_newline, std=text.hidden_size**-0.5)
    return model


def patches(tower: Any, frames: Tensor) -> Tensor:
    """Uint8 [N, 384, 384, 3] → the tower's last hidden states, before its last norm, [N, 729, width]."""
    pixels = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    return tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state


def pooled(tower: Any, hidden: Tensor) -> Tensor:
    """Last hidden states [N, 729, width] → SigLIP's image embedding [N, width]."""
    return tower.head(tower.post_layernorm(hidden))


def salience(tower: Any, hidden: Tensor) -> Tensor:
    """Last hidden states [N, 729, width] → attention of the pooling head, mean of its heads, pooled to [N, 196] fp32."""
    head = tower.head
    normed = tower.post_layernorm(hidden)
    weights = head.attention(head.probe.repeat(len(hidden), 1, 1), normed, normed, need_weights=True)[1]
    return pool(weights.float().transpose(1, 2))[..., 0]


def pool(x: Tensor) -> Tensor:
    """[N, 27·27, C] → [N, 14·14, C], bilinear."""
    grid = x.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    return nnf.interpolate(grid, size=(POOLED_SIDE, POOLED_SIDE), mode="bilinear").flatten(2).transpose(1, 2)


def project(projector: Any, hidden: Tensor) -> Tensor:
    """Last hidden states [N, 729, width] → visual tokens [N, 196, width of the decoder].

    Pooling is linear and comes before the second layer, on a quarter of the tokens.
    """
    return projector.linear_2(pool(projector.act(projector.linear_1(hidden))))


def questions_after_video(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of a sequence of one video and many questions about it.

    The video is causal, and all questions share its keys. ``attention_mask`` [1, 1, Q·T, V + Q·T] is that of the questions.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    V = query.shape[2] - attention_mask.shape[2]
    video = nnf.scaled_dot_product_attention(
        query[:, :, :V], key[:, :, :V], value[:, :, :V], is_causal=True, scale=scaling
    )
    text = nnf.scaled_dot_product_attention(query[:, :, V:], key, value, attn_mask=attention_mask, scale=scaling)
    return torch.cat((video, text), 2).transpose(1, 2), None


AttentionInterface.register("questions_after_video", questions_after_video)


def question_mask(V: int, Q: int, T: int, device: torch.device) -> Tensor:
    """[1, 1, Q·T, V + Q·T]: a token of a question sees the video and the question up to itself."""
    block = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    own = torch.block_diag(*[block] * Q)
    return torch.cat((torch.ones(Q * T, V, dtype=torch.bool, device=device), own), 1)[None, None]


def answer_logits(model: Any, video: Tensor, before: Tensor, texts: Tensor) -> Tensor:
    """Logits of many questions about each clip; no question sees another.

    Args:
        model: LLaVA-OneVision with the attention ``questions_after_video``.
        video: [B, V, width], the tokens of each clip that the decoder sees.
        before: [n], the ids before the video.
        texts: [B, Q, T], the ids after the video, padded at the end.

    Returns:
        [B, Q, T, vocabulary].
    """
    decoder = model.model.language_model
    B, Q, T = texts.shape
    table = decoder.embed_tokens
    newline = model.model.image_newline.to(video.dtype)
    prefix = torch.cat((table(before).expand(B, -1, -1).to(video.dtype), video, newline.expand(B, 1, -1)), 1)
    V = prefix.shape[1]
    embeddings = torch.cat((prefix, table(texts.flatten(1)).to(video.dtype)), 1)
    positions = torch.cat((torch.arange(V, device=texts.device), (V + torch.arange(T, device=texts.device)).repeat(Q)))
    mask = {"full_attention": question_mask(V, Q, T, texts.device)}
    hidden = decoder(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions[None], use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, V:]).unflatten(1, (Q, T))


def siglip_logits(model: Any, images: Tensor, texts: Tensor) -> Tensor:
    """SigLIP's logits of every image [N, width] with every text [M, PHRASE], [N, M] fp32."""
    states = model.text_model(input_ids=texts).pooler_output
    similarity = nnf.normalize(images.float(), dim=-1) @ nnf.normalize(states.float(), dim=-1).T
    return similarity * model.logit_scale.exp() + model.logit_bias


def siglip_loss(logits: Tensor, true: Tensor) -> Tensor:
    """SigLIP's sigmoid loss (arXiv 2303.15343) where ``true`` [N, M] marks the texts that are true of an image."""
    return -nnf.logsigmoid(torch.where(true, logits, -logits)).sum(1).mean()
