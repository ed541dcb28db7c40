"""LLaVA's graphs: vision, embedding and decoder."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from tango_export.families.llava.config import Dimensions, check_side
from tango_export.families.settings import bundle_dimensions
from tango_export.graph.builder import Array, Definition, GraphBuilder, Read, Weight
from tango_export.models import qwen2, siglip
from tango_export.models.projector import Pooling, PoolingMode, pool, projector
from tango_runtime.bundle import InnerPruning, Manifest

#: Mean and standard deviation of each channel of SigLIP's pixels (preprocessor_config.json).
MEAN_AND_STD = 0.5


def bundle_definitions(mode: PoolingMode, manifest: Manifest) -> tuple[Definition, ...]:
    """The graphs of a bundle.

    Args:
        mode: The family's pooling.
        manifest: The bundle's.

    Raises:
        TangoError: Its ``config`` is not this family's, or has a number out of range.
    """
    config, decoder = bundle_dimensions(Dimensions, manifest.config), manifest.decoder
    check_side(config.vision)
    pooling, vocabulary = Pooling(mode, config.vision.side), manifest.prompt.vocabulary
    return definitions(config, pooling, decoder.context, vocabulary, False, decoder.inner)


def definitions(
    config: Dimensions, pooling: Pooling, context: int, vocabulary: int, tied: bool, inner: InnerPruning | None
) -> tuple[Definition, ...]:
    """The graphs of a checkpoint.

    Args:
        config: Dimensions.
        pooling: From the tower's patches to the decoder's tokens.
        context: Most positions.
        vocabulary: Ids that may be sampled.
        tied: The head is the embedding table.
        inner: Where the decoder drops tokens on its way; None for a decoder in one graph.
    """
    first = inner.layer if inner else 0
    upper = Definition(
        "decoder_high" if inner else "decoder",
        lambda g: qwen2.decoder(g, config.text, context, vocabulary, first),
        {"lm_head.": "decoder.embed_tokens." if tied else "lm_head.", "": "decoder."},
        qwen2.no_device_form(config.text),
    )
    lower = Definition(
        "decoder_low",
        lambda g: qwen2.lower_decoder(g, config.text, context, first),
        {"": "decoder."},
        qwen2.no_device_form(config.text),
    )
    return (
        Definition(
            "vision",
            lambda g: vision(g, config, pooling),
            {"salience.": "tower."},
            siglip.no_device_form(config.vision),
        ),
        Definition("embed", lambda g: embed(g, config), {}),
        *([lower] if inner else []),
        upper,
    )


def vision(g: GraphBuilder, c: Dimensions, pooling: Pooling) -> None:
    """Frames → features and salience."""
    size, tokens, width = c.vision.image_size, pooling.side**2, c.text.hidden_size
    frames = g.input("frames", "uint8", "F", size, size, 3)
    x = siglip.tower(g, normalized_pixels(g, frames), c.vision)  # [F, patches, vision width]
    salience, patches = siglip.salience(g, x, c.vision)  # [F, patches]
    column = g.node("Unsqueeze", [salience, g.constant([-1])], "salience.column")
    pooled = pool(g, "pool", column, pooling, "float32")  # [F, tokens, 1]
    features = projector(g, patches, c.vision.hidden_size, width, pooling)
    g.output(features, "features", g.dtype, "F", tokens, width)
    g.output(g.node("Squeeze", [pooled, g.constant([2])], "salience.row"), "salience", "float32", "F", tokens)


def normalized_pixels(g: GraphBuilder, frames: str) -> str:
    """SigLIP's normalization: a pixel becomes (x / 255 − 0.5) / 0.5."""
    half = g.constant(MEAN_AND_STD, "float32")
    unit = g.node(
        "Div",
        [g.node("Cast", [frames], "pixels.fp32", to=TensorProto.FLOAT), g.constant(255.0, "float32")],
        "pixels.unit",
    )
    centered = g.node("Sub", [unit, half], "pixels.centered")
    return g.narrow(g.node("Div", [centered, half], "pixels.scaled"), "pixels")


def embed(g: GraphBuilder, c: Dimensions) -> None:
    """Token ids → rows of the table; the newline follows the vocabulary."""
    rows, width = c.text.vocab_size, c.text.hidden_size
    names = ("decoder.embed_tokens.weight", "newline")

    def table(read: Read) -> Array:
        tokens, newline = map(read, names)
        return np.concatenate((tokens, newline[None]))

    tensors = dict(zip(names, ((rows, width), (width,)), strict=True))
    weight = g.weight(Weight("table", (rows + 1, width), g.dtype, tensors, table))
    found = g.node("Gather", [weight, g.input("ids", "int64", "N")], "table.rows")
    g.output(found, "embeddings", g.dtype, "N", width)
