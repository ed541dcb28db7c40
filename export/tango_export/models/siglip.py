"""SigLIP's vision tower, and the attention of its pooling head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tango_export.graph.builder import Addition, Array, GraphBuilder, Read, Weight
from tango_export.layers import gelu_mlp, linear, self_attention

#: What the kernel of a tower's attention takes of the width of a head.
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 8, 128


@dataclass(frozen=True)
class SiglipConfig:
    """Dimensions of a SigLIP vision tower, in the words of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6

    @property
    def side(self) -> int:
        """Patches along one edge of a frame."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.side**2


def tower(g: GraphBuilder, pixels: str, c: SiglipConfig) -> Addition:
    """The tower up to its last layer, before any final norm: [F, size, size, 3] → [F, patches, D]."""
    x: str | Addition = embeddings(g, "tower.embeddings", pixels, c)  # [F, patches, D]
    for i in range(c.num_hidden_layers):
        x = encoder_layer(g, f"tower.encoder.layers.{i}", x, c)
    assert isinstance(x, Addition)
    return x


def embeddings(g: GraphBuilder, name: str, pixels: str, c: SiglipConfig) -> str:
    """Patches and their positions: [F, size, size, 3] → [F, patches, D].

    The convolution of patches that do not overlap is a matrix product. Pixels past the last whole patch are left out,
    as a convolution leaves them out.
    """
    side, size, width = c.side, c.patch_size, c.hidden_size
    whole = [g.constant(numbers) for numbers in ([0, 0], [side * size] * 2, [1, 2], [1, 1])]
    x = g.node("Slice", [pixels, *whole], f"{name}.whole_patches")
    x = g.reshape(x, f"{name}.grid", -1, side, size, side, size, 3)
    x = g.node("Transpose", [x], f"{name}.patches", perm=[0, 1, 3, 5, 2, 4])  # [F, rows, columns, 3, size, size]
    x = g.reshape(x, f"{name}.flat", -1, c.patches, 3 * size**2)
    patches = linear(g, f"{name}.patch_embedding", x, 3 * size**2, width, tokens=c.patches, patch=(3, size, size))
    positions = g.parameter(f"{name}.position_embedding.weight", c.patches, width)
    return g.node("Add", [g.form.add_bias(g, patches), positions], name)


def encoder_layer(g: GraphBuilder, name: str, x: str | Addition, c: SiglipConfig) -> Addition:
    """Attention and MLP, each after its norm: [F, patches, D] → the same."""
    width, eps = c.hidden_size, c.layer_norm_eps
    normed, x = g.form.layer_norm(g, f"{name}.layer_norm1", x, width, eps)
    mixed = self_attention(g, f"{name}.self_attn", normed, c.patches, width, c.num_attention_heads)
    normed, x = g.form.layer_norm(g, f"{name}.layer_norm2", Addition(f"{name}.attended", x, mixed), width, eps)
    return Addition(name, x, gelu_mlp(g, f"{name}.mlp", normed, c.patches, width, c.intermediate_size))


def salience(g: GraphBuilder, x: Addition, c: SiglipConfig) -> tuple[str, str]:
    """Attention that each patch receives from the pooling head's probe, averaged over heads.

    The probe is a constant, so query and key projection fold into one matrix. What the key bias adds is the same for
    every patch and leaves the softmax as it is.

    Returns:
        Salience [F, patches] fp32, each row of which sums to 1, and x [F, patches, D].
    """
    normed, patches = g.form.layer_norm(g, "salience.post_layernorm", x, c.hidden_size, c.layer_norm_eps)
    scores = g.node("MatMul", [g.widen(normed, "salience.fp32"), folded_probe(g, c)], "salience.scores")
    shares = g.node("Softmax", [scores], "salience.softmax", axis=1)  # [F, patches, heads]
    return g.mean(shares, "salience.mean", -1, keepdims=0), patches


def folded_probe(g: GraphBuilder, c: SiglipConfig) -> str:
    """The pooling head's probe with its query and key projections, [D, heads] fp32.

    score[h, patch] = <W_q,h·probe + b_q,h , W_k,h·x + b_k,h> / √d; the b_k term is constant over patches and dropped.
    """
    width, heads = c.hidden_size, c.num_attention_heads
    probe, weight, bias = names = ("head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias")

    def values(read: Read) -> Array:
        p, w, b = (read(name).astype(np.float64) for name in (probe, weight, bias))  # query, key and value stacked
        query = (w[:width] @ p.ravel() + b[:width]).reshape(heads, -1)
        key = w[width : 2 * width].reshape(heads, -1, width)
        return np.asarray(np.einsum("hd,hdw->wh", query, key) * (width // heads) ** -0.5)

    shapes = ((1, 1, width), (3 * width, width), (3 * width,))
    tensors = dict(zip(names, shapes, strict=True))
    return g.weight(Weight("salience.probe", (width, heads), "float32", tensors, values))


def no_device_form(c: SiglipConfig) -> str | None:
    """Why the kernel of its attention does not take a tower; None where it does (tango/vision_attention.h)."""
    width = c.hidden_size // c.num_attention_heads
    if width % HEAD_DIM_MULTIPLE or width > MAX_HEAD_DIM:
        return f"its heads are {width} wide, no multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    return None
