"""What a checkpoint folder says about text: tokenizer, chat template, stop tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from tango_export.checkpoint import read_json
from tango_plugins import TangoError
from tango_runtime.util.errors import first_line


def read_tokenizer(folder: Path) -> tuple[str, Tokenizer]:
    """Reads a checkpoint's tokenizer.

    Args:
        folder: The checkpoint. Where it has no tokenizer.json, transformers makes one of vocab.json and merges.txt.

    Returns:
        The text of a tokenizer.json, and the tokenizer.

    Raises:
        TangoError: There is none, or it cannot be read.
    """
    file = folder / "tokenizer.json"
    download = "download tokenizer.json with the checkpoint"
    # transformers makes an empty tokenizer of no files at all
    if not file.is_file() and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise TangoError(f"{folder} has no tokenizer.json", download)
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else _converted(folder)
        return text, Tokenizer.from_str(text)
    except TangoError:
        raise
    except Exception as error:  # tokenizers and transformers raise bare Exceptions
        raise TangoError(f"{folder} has no readable tokenizer: {first_line(error)}", download) from error


def _converted(folder: Path) -> str:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise TangoError(
            f"{folder} has no tokenizer.json; only transformers makes one of vocab.json and merges.txt",
            "download tokenizer.json, or pip install 'tango-edge[validate]'",
        ) from error

    text: str = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str()
    return text


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the highest id that the tokenizer gives."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def stop_ids(folder: Path, tokenizer: Tokenizer, configured: object, tokens: Iterable[str]) -> tuple[int, ...]:
    """Ids that end an answer: those of generation_config.json and config.json, and the family's.

    Args:
        folder: The checkpoint.
        tokenizer: Its tokenizer.
        configured: ``eos_token_id`` of its config.json.
        tokens: The family's stop tokens.
    """
    generation = folder / "generation_config.json"
    named = read_json(generation).get("eos_token_id") if generation.is_file() else None
    found: set[object] = {tokenizer.token_to_id(token) for token in tokens}
    for ids in (named, configured):
        found.update(ids if isinstance(ids, list) else [ids])
    return tuple(sorted(id_ for id_ in found if isinstance(id_, int)))


def read_chat_template(folder: Path) -> str | None:
    """The checkpoint's chat template, wherever its version of transformers put it; None if it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(template, str):
            return template
    return None
