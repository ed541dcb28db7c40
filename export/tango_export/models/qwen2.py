"""The Qwen2 decoder for one sequence, its key/value cache outside."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnx import TensorProto

from tango_export.graph.builder import Addition, Biased, CacheShape, GraphBuilder, Positions
from tango_export.graph.portable import added
from tango_export.layers import gated_mlp, linear, packed_linear, rms_norm
from tango_plugins import decoder as kernel


@dataclass(frozen=True)
class Qwen2Config:
    """Dimensions of a Qwen2 decoder, in the words of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def cache(self, context: int, layers: range | None = None) -> CacheShape:
        """The key/value cache of some of its layers, by default all, for this many positions."""
        layers = range(self.num_hidden_layers) if layers is None else layers
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        return CacheShape(len(layers), heads, kv_heads, self.head_dim, context, self.rope_theta, layers.start)


@dataclass(frozen=True)
class MRopeConfig(Qwen2Config):
    """A decoder whose rotary positions have three axes, which share the frequencies."""

    mrope_section: tuple[int, int, int] = (16, 24, 24)

    def cache(self, context: int, layers: range | None = None) -> CacheShape:
        """As of any other, with the frequencies of each axis."""
        return replace(super().cache(context, layers), sections=self.mrope_section)


def decoder(g: GraphBuilder, c: Qwen2Config, context: int, vocabulary: int, first: int = 0) -> None:
    """Embeddings of T tokens in, logits of the last one and the new rows of the cache out.

    Args:
        g: The graph.
        c: Dimensions.
        context: Most positions.
        vocabulary: Ids that the tokenizer knows. The rows of the head beyond them are padding, some of it random; they
            give no logit, so they are never sampled.
        first: The first layer of the graph. Where it is not 0, rows of :func:`lower_decoder` take the place of the
            embeddings.
    """
    cache = c.cache(context, range(first, c.num_hidden_layers))
    embeddings, positions = g.form.start_decoder(g, c.hidden_size, cache)  # [T, D]
    x: str | Addition = embeddings
    for layer in cache.indices:
        x = decoder_layer(g, layer, x, positions, c, cache)
    normed, _ = rms_norm(g, "norm", x, c.hidden_size, c.rms_norm_eps)  # [1, D]
    row = linear(g, "lm_head", normed, c.hidden_size, c.vocab_size, bias=False).value
    known = g.slice(g.reshape(row, "lm_head.row", -1), "lm_head.known", axis=0, end=vocabulary)
    # A Cast in fp32, too: TensorRT 8.6 left an output that is a Slice all zero.
    logits = g.node("Cast", [known], "lm_head.fp32", to=TensorProto.FLOAT)
    g.output(logits, "logits", "float32", vocabulary, first=True)


def lower_decoder(g: GraphBuilder, c: Qwen2Config, context: int, end: int) -> None:
    """The layers before ``end``: embeddings of T tokens in, their rows [T, D] out.

    Out comes also what the last of the tokens attends to in the last of these layers: a share for each position, of
    which those count that the sequence has.
    """
    cache = replace(c.cache(context, range(end)), share=end - 1)
    embeddings, positions = g.form.start_decoder(g, c.hidden_size, cache)
    x: str | Addition = embeddings
    for layer in cache.indices:
        x = decoder_layer(g, layer, x, positions, c, cache)
    g.output(added(g, x), "rows", g.dtype, "N", c.hidden_size, first=True)


def decoder_layer(
    g: GraphBuilder, layer: int, x: str | Addition, positions: Positions, c: Qwen2Config, cache: CacheShape
) -> Addition:
    """Attention and MLP, each after its norm: [T, D] → the same.

    All that is asked of the last layer, but for its keys and values, is the last position: [T, D] → [1, D].
    """
    name, width, eps = f"layers.{layer}", c.hidden_size, c.rms_norm_eps
    last = layer == c.num_hidden_layers - 1
    normed, x = rms_norm(g, f"{name}.input_layernorm", x, width, eps)
    mixed = self_attention(g, f"{name}.self_attn", layer, normed, positions, c, cache, last)
    if last:
        x = g.form.last_position(g, f"{name}.last", x, width)
    normed, x = rms_norm(g, f"{name}.post_attention_layernorm", Addition(f"{name}.attended", x, mixed), width, eps)
    return Addition(name, x, gated_mlp(g, f"{name}.mlp", normed, width, c.intermediate_size))


def self_attention(
    g: GraphBuilder,
    name: str,
    layer: int,
    x: str,
    positions: Positions,
    c: Qwen2Config,
    cache: CacheShape,
    last: bool,
) -> Biased:
    """Grouped-query attention over cached and new keys: [T, D] → the same, or [1, D] where ``last`` is set."""
    width, kv_width = c.hidden_size, c.num_key_value_heads * c.head_dim
    parts = {"q_proj": width, "k_proj": kv_width, "v_proj": kv_width}
    qkv = packed_linear(g, f"{name}.qkv_proj", x, width, parts)  # [T, D + 2·kv width]
    mixed = g.form.cached_attention(g, name, layer, qkv, positions, cache, last)
    return linear(g, f"{name}.o_proj", mixed, width, width, bias=False)


def no_device_form(c: Qwen2Config) -> str | None:
    """Why the kernel that decodes does not take a decoder; None where it does."""
    widths = (c.head_dim, c.hidden_size, c.num_key_value_heads * c.head_dim, c.intermediate_size, c.vocab_size)
    if any(width % kernel.DIM_MULTIPLE for width in widths):
        return f"a width is no multiple of {kernel.DIM_MULTIPLE}"
    queries = c.num_attention_heads // c.num_key_value_heads * c.head_dim
    if c.head_dim > kernel.MAX_HEAD_DIM or queries > kernel.MAX_GROUP_WIDTH:
        return f"its heads are wider than {kernel.MAX_HEAD_DIM}, or a group of them wider than {kernel.MAX_GROUP_WIDTH}"
    return None
