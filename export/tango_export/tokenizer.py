"""What a checkpoint folder says about text: tokenizer, chat template, stop tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tango_export.checkpoint import read_json
from tango_plugins import TangoError
from tango_runtime.util.errors import first_line
from tango_runtime.util.jsonschema import shown
from tango_runtime.util.numbers import is_integer

#: Ids are below it: they are 32-bit integers in bundles.
_MOST_IDS = 1 << 31


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
        tokenizer = Tokenizer.from_str(text)
    except TangoError:
        raise
    except Exception as error:  # tokenizers and transformers raise bare Exceptions
        raise TangoError(f"{folder} has no readable tokenizer: {first_line(error)}", download) from error
    if not tokenizer.get_vocab_size():
        raise TangoError(f"{folder} has a tokenizer with an empty vocabulary", download)
    return text, tokenizer


def _converted(folder: Path) -> str:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise TangoError(
            f"{folder} has no tokenizer.json; only transformers makes one of vocab.json and merges.txt",
            "download tokenizer.json, or pip install 'tango-edge[validate]'",
        ) from error

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text: str = tokenizer.backend_tokenizer.to_str()
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

    Raises:
        TangoError: What is there is no id, or no id is one of the tokenizer's.
    """
    generation = folder / "generation_config.json"
    named = read_json(generation).get("eos_token_id") if generation.is_file() else None
    found = {id_ for token in tokens if (id_ := tokenizer.token_to_id(token)) is not None}
    for file, ids in ((generation, named), (folder / "config.json", configured)):
        given: list[Any] = ids if isinstance(ids, list) else [] if ids is None else [ids]
        for value in given:
            if not is_integer(value) or not 0 <= value < _MOST_IDS:
                raise TangoError(f"{file}: eos_token_id has {shown(value)}, not a token's id", f"edit {file.name}")
            found.add(value)
    if not any(id_ < vocabulary_size(tokenizer) for id_ in found):
        raise TangoError(
            f"{folder} names no token that ends an answer",
            f"give eos_token_id, an id of its tokenizer, in {generation}",
        )
    return tuple(sorted(found))


def read_chat_template(folder: Path) -> str | None:
    """The checkpoint's chat template, wherever its version of transformers put it; None if it has none.

    Raises:
        TangoError: It is not UTF-8, or there are several and none is the default.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TangoError(f"{file} is not valid UTF-8: {error}", "save it as UTF-8") from error
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if template is not None:
            return _default(template, folder / name)
    return None


def _default(template: object, file: Path) -> str:
    """A template as it is, or that named ``default`` of several: an object, or a list of names and templates."""
    if isinstance(template, list) and all(isinstance(each, dict) for each in template):
        template = {each.get("name"): each.get("template") for each in template}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise TangoError(f"{file}: chat_template is not text, and has none named default", f"edit {file.name}")
    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise TangoError(f"{file}: chat_template is not valid Unicode: {error}", f"edit {file.name}") from error
    return template
