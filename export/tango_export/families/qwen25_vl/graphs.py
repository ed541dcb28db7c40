"""Qwen2.5-VL's graphs: vision, embedding and decoder."""

from __future__ import annotations

from tango_export.families.qwen25_vl.config import Dimensions
from tango_export.families.settings import bundle_dimensions
from tango_export.graph.builder import Definition, GraphBuilder
from tango_export.models import qwen2, qwen_vision
from tango_runtime.bundle import Manifest


def bundle_definitions(manifest: Manifest) -> tuple[Definition, ...]:
    """The graphs of a bundle.

    Raises:
        TangoError: Its ``config`` is not this family's, or has a number out of range.
    """
    config = bundle_dimensions(Dimensions, manifest.config)
    return definitions(config, manifest.decoder.context, manifest.prompt.vocabulary, False)


def definitions(config: Dimensions, context: int, vocabulary: int, tied: bool) -> tuple[Definition, ...]:
    """The graphs of a checkpoint.

    Args:
        config: Dimensions.
        context: Most positions.
        vocabulary: Ids that may be sampled.
        tied: The head is the embedding table.
    """
    head = "decoder.embed_tokens." if tied else "lm_head."
    return (
        Definition(
            "vision",
            lambda g: qwen_vision.vision(g, config.vision),
            {},
            qwen_vision.no_device_form(config.vision),
        ),
        Definition("embed", lambda g: embed(g, config), {"table.": "decoder.embed_tokens."}),
        Definition(
            "decoder",
            lambda g: qwen2.decoder(g, config.text, context, vocabulary),
            {"lm_head.": head, "": "decoder."},
            qwen2.no_device_form(config.text),
        ),
    )


def embed(g: GraphBuilder, c: Dimensions) -> None:
    """Token ids → rows of the table."""
    table = g.parameter("table.weight", c.text.vocab_size, c.text.hidden_size)
    found = g.node("Gather", [table, g.input("ids", "int64", "N")], "table.rows")
    g.output(found, "embeddings", g.dtype, "N", c.text.hidden_size)
