"""LLaVA-OneVision's graphs: vision, embedding and decoder, and where their weights come from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tango_export.checkpoint import Checkpoint
from tango_export.families.llava_ov.config import LlavaOvConfig
from tango_export.families.llava_ov.weights import bound
from tango_export.graphs import Graph
from tango_export.modules.projector import Pool, Projector
from tango_export.modules.qwen2 import Decoder, Qwen2Config
from tango_export.modules.siglip import Salience, Tower, fold_probe
from tango_runtime.bundle import DType, TensorSpec

#: SigLIP's: a pixel becomes (x / 255 − 0.5) / 0.5.
PIXEL_MEAN, PIXEL_STD = 0.5, 0.5


class Vision(nn.Module):
    """The vision graph: frames → features and salience."""

    def __init__(self, config: LlavaOvConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.tower = Tower(config.vision, dtype)
        self.salience = Salience(config.vision)
        pool = Pool(config.vision.side, dtype)
        self.projector = Projector(config.vision.hidden_size, config.text.hidden_size, pool, dtype)
        self.pool = Pool(config.vision.side, torch.float32)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Uint8 [F, size, size, 3] → features [F, L, D] and salience [F, L] fp32."""
        pixels = (frames.float() / 255 - PIXEL_MEAN) / PIXEL_STD
        patches = self.tower(pixels.to(self.dtype))
        salience = self.pool(self.salience(patches).unsqueeze(-1)).squeeze(-1)
        return self.projector(patches), salience


class Embed(nn.Module):
    """The embedding graph: token ids → rows of the table; the newline follows the vocabulary."""

    def __init__(self, config: LlavaOvConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.text.vocab_size + 1, config.text.hidden_size, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """[N] int64 → [N, D]."""
        return nn.functional.embedding(ids, self.table)


_DTYPE_NAMES: dict[torch.dtype, DType] = {torch.float16: "float16", torch.float32: "float32"}


def make_graphs(
    config: LlavaOvConfig, checkpoint: Checkpoint, head: Checkpoint, dtype: torch.dtype, vocabulary: int
) -> tuple[Graph, ...]:
    """The graphs of a checkpoint; weights are read when a graph is written.

    Args:
        config: Dimensions.
        checkpoint: LLaVA-OneVision's tensors.
        head: SigLIP's pooling head.
        dtype: Of weights and features.
        vocabulary: Ids that may be sampled.
    """
    with torch.device("meta"):
        vision, embed, decoder = Vision(config, dtype), Embed(config, dtype), Decoder(config.text, dtype, vocabulary)
    name = _DTYPE_NAMES[dtype]
    return (
        _vision_graph(vision, config, checkpoint, head, name),
        _embed_graph(embed, checkpoint, name),
        _decoder_graph(decoder, config.text, checkpoint, name),
    )


def _vision_graph(
    vision: Vision, config: LlavaOvConfig, checkpoint: Checkpoint, head: Checkpoint, dtype: DType
) -> Graph:
    size, tokens, width = config.vision.image_size, vision.pool.tokens, config.text.hidden_size
    parts = [
        ("tower", vision.tower, "tower."),
        ("salience", vision.salience, "tower."),
        ("projector", vision.projector, "projector."),
    ]
    weights = {
        f"{attribute}.{name}": source
        for attribute, module, prefix in parts
        for name, source in bound(module, prefix, checkpoint).items()
    }
    computed = {
        "salience.probe": lambda: _folded_probe(head, config.vision.num_attention_heads),
        "pool.weight": vision.pool.matrix,
        "projector.pool.weight": vision.pool.matrix,
    }
    return Graph(
        "vision",
        vision,
        inputs=(TensorSpec("frames", "uint8", ("F", size, size, 3)),),
        outputs=(TensorSpec("features", dtype, ("F", tokens, width)), TensorSpec("salience", "float32", ("F", tokens))),
        weights=weights | computed,
    )


def _folded_probe(head: Checkpoint, heads: int) -> Tensor:
    weight, bias = head.tensor("head.attention.in_proj_weight"), head.tensor("head.attention.in_proj_bias")
    return fold_probe(head.tensor("head.probe"), weight, bias, heads)


def _embed_graph(embed: Embed, checkpoint: Checkpoint, dtype: DType) -> Graph:
    def table() -> Tensor:
        return torch.cat((checkpoint.tensor("decoder.embed_tokens.weight"), checkpoint.tensor("newline")[None]))

    return Graph(
        "embed",
        embed,
        inputs=(TensorSpec("ids", "int64", ("N",)),),
        outputs=(TensorSpec("embeddings", dtype, ("N", embed.table.shape[1])),),
        weights={"table": table},
    )


def _decoder_graph(decoder: Decoder, text: Qwen2Config, checkpoint: Checkpoint, dtype: DType) -> Graph:
    def cache(when: str, tokens: str) -> list[TensorSpec]:
        shape = (text.num_key_value_heads, tokens, text.head_dim)
        names = [f"{when}_{kind}.{i}" for i in range(text.num_hidden_layers) for kind in ("key", "value")]
        return [TensorSpec(name, dtype, shape) for name in names]

    weights = bound(decoder, "decoder.", checkpoint) | {"rotary.inv_freq": decoder.rotary.frequencies}
    if "lm_head.weight" not in checkpoint:
        weights["lm_head.weight"] = lambda: checkpoint.tensor("decoder.embed_tokens.weight").T
    embeddings, positions = (
        TensorSpec("embeddings", dtype, ("N", text.hidden_size)),
        TensorSpec("positions", "int64", ("N",)),
    )
    return Graph(
        "decoder",
        decoder,
        inputs=(embeddings, positions, *cache("past", "P")),
        outputs=(TensorSpec("logits", "float32", (decoder.vocabulary,)), *cache("new", "N")),
        weights=weights,
    )
