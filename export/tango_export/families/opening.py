"""What opening a checkpoint of any family checks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from tango_export.graph import PORTABLE, Definition, build
from tango_export.tokenizer import vocabulary_size
from tango_plugins import TangoError


def check_context(context: int, most: int) -> None:
    """Refuses a context that the decoder was not made for."""
    if not 1 <= context <= most:
        raise TangoError(
            f"--context is {context}, the decoder was made for 1 to {most} positions", f"give at most --context {most}"
        )


def read_vocabulary(folder: Path, tokenizer: Tokenizer, rows: int) -> int:
    """Ids that the tokenizer gives, of a table of so many rows.

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


def expected_tensors(graphs: Iterable[Definition]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that some graphs are made of, by canonical name."""
    expected: dict[str, tuple[int, ...]] = {}
    for definition in graphs:
        for weight in build(definition, PORTABLE, "float32").weights:
            expected |= weight.tensors
    return expected
