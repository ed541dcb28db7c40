"""What opening a checkpoint of any family checks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from tango_export.checkpoint import Checkpoint
from tango_export.graph import PORTABLE, Definition, build
from tango_export.graph.blocks import PackedLayers
from tango_export.models.qwen2 import Qwen2Config
from tango_export.tokenizer import read_chat_template, vocabulary_size
from tango_plugins import TangoError
from tango_runtime.bundle import DecoderSpec
from tango_runtime.util.console import status

#: Both of Qwen2's ends; checkpoints name one or the other.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


def check_context(context: int, most: int) -> None:
    """Rejects a context that the decoder was not made for."""
    if not 1 <= context <= most:
        raise TangoError(
            f"--context is {context}, the decoder was made for 1 to {most} positions", f"give at most --context {most}"
        )


def read_vocabulary(folder: Path, tokenizer: Tokenizer, rows: int) -> int:
    """Number of ids that the tokenizer gives, for a table of ``rows`` rows.

    Raises:
        TangoError: The table has fewer.
    """
    vocabulary = vocabulary_size(tokenizer)
    if vocabulary > rows:
        raise TangoError(
            f"{folder}: the tokenizer has {vocabulary} ids, the table {rows} rows",
            "tokenizer and weights are not of the same checkpoint; download it again",
        )
    return vocabulary


def chat_template(folder: Path, default: str, whose: str) -> str:
    """The checkpoint's chat template; where it has none, or an empty one, a default, which is said.

    Args:
        folder: The checkpoint.
        default: The template in its place.
        whose: Whose template that is.
    """
    found = read_chat_template(folder)
    if found is None or not found.strip():
        status(f"{folder} has {'no' if found is None else 'an empty'} chat template; {whose} is used")
        return default
    return found


def decoder_spec(text: Qwen2Config, context: int) -> DecoderSpec:
    """The description of a Qwen2 decoder in bundle.json, for a context of ``context`` positions."""
    return DecoderSpec(
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        context=context,
        norm_eps=text.rms_norm_eps,
    )


def expected_tensors(graphs: Iterable[Definition]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that some graphs are made of, by canonical name."""
    expected: dict[str, tuple[int, ...]] = {}
    for definition in graphs:
        for weight in build(definition, PORTABLE, "float32").weights:
            expected |= weight.tensors
    return expected


def packed_layers(checkpoint: Checkpoint) -> PackedLayers | None:
    """The layers that a checkpoint stores in 4 bits; None where there are none."""
    names = frozenset(name for name in checkpoint if checkpoint.is_packed(name))
    return PackedLayers(checkpoint.packing, names) if checkpoint.packing and names else None
