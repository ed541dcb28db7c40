"""What a checkpoint folder says about text: tokenizer, chat template, stop tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tango_export.checkpoint import read_json
from tango_plugins import TangoError
from tango_runtime.util.console import status
from tango_runtime.util.errors import first_line
from tango_runtime.util.jsonschema import parse_json, shown
from tango_runtime.util.numbers import is_integer

#: Ids are below it: they are 32-bit integers in bundles.
_MOST_IDS = 1 << 31

#: Files that name special tokens; what the first one says counts.
_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")

#: What they call tokens that chat templates write by these names.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

#: Where a chat template may be, in the order in which transformers looks for it.
_TEMPLATE_FILES = (
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/default.jinja",
)


def read_tokenizer(folder: Path) -> tuple[str, Tokenizer]:
    """Reads a checkpoint's tokenizer.

    Args:
        folder: The checkpoint. Where it has no tokenizer.json, transformers makes one of vocab.json and merges.txt.

    Returns:
        The text of a tokenizer.json, and the tokenizer.

    Raises:
        TangoError: There is none, it cannot be read, or other files name tokens that it does not know.
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
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for source, token, id_ in _named_tokens(folder, text):
        found = _encoded(tokenizer, token)
        if len(found) != 1 or id_ not in (None, found[0]):
            raise TangoError(
                f"{source} names the token {token[:60]!r}{'' if id_ is None else f' with the id {id_}'}, "
                f"tokenizer.json reads it as {found[:8]}",
                "save the tokenizer again with transformers, or download its files again",
            )
    return text, tokenizer


def _named_tokens(folder: Path, tokenizer: str) -> Iterator[tuple[Path, str, int | None]]:
    """The tokens that files add to a vocabulary: the file, the text, and the id if there is one.

    transformers adds them when it loads the tokenizer, and tokenizers gives those of tokenizer.json other ids if their
    own are taken.
    """
    file = folder / "tokenizer.json"
    added: dict[str, Any] = parse_json(tokenizer, str(file), "download it again")
    for token in added.get("added_tokens") or ():
        yield file, token["content"], token["id"]
    file = folder / "added_tokens.json"
    for text, id_ in _read_if_there(file).items():
        yield file, text, id_
    for name in _TOKEN_FILES:
        file, data = folder / name, _read_if_there(folder / name)
        for id_, token in _items(data, "added_tokens_decoder", file):
            yield file, _token_text(token, file), int(id_) if id_.isdecimal() and len(id_) < 20 else -1
        for key in ("extra_special_tokens", "additional_special_tokens"):
            for _, token in _items(data, key, file):
                yield file, _token_text(token, file), None


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text; none where the tokenizer cannot encode it."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception:  # as of a vocabulary that lacks a word, and the token for unknown ones
        return []
    return ids


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _items(data: dict[str, Any], key: str, file: Path) -> Iterable[tuple[str, Any]]:
    """What an object or a list in a file holds."""
    found = data.get(key) or {}
    if isinstance(found, list):
        found = {str(i): item for i, item in enumerate(found)}
    if not isinstance(found, dict):
        raise TangoError(f"{file}: {key} is {shown(found)}, not an object or a list", f"edit {file.name}")
    return found.items()


def _token_text(token: object, file: Path) -> str:
    """The text of a token, which files give as it is or with its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TangoError(f"{file} names a token {shown(token)}, which is no text", f"edit {file.name}")
    return text


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

    The special tokens that it writes by their names, such as ``eos_token``, are defined at its beginning. If several
    files hold different templates, a status line names them.

    Raises:
        TangoError: It is not UTF-8, there are several and none is the default, or a name that it uses is no token's.
    """
    places = [folder / name for name in _TEMPLATE_FILES]
    found = {file: text for file in places if (text := _template_in(file)) is not None}
    if not found and (text := _template_in(folder / "tokenizer_config.json")) is not None:  # often of the text model
        found = {folder / "tokenizer_config.json": text}
    if not found:
        if others := sorted((folder / "additional_chat_templates").glob("*.jinja")):
            raise TangoError(
                f"{folder} has chat templates, such as {others[0]}, and none named default",
                "save the one that was trained with as chat_template.jinja",
            )
        return None
    used = next((file for file, text in found.items() if text.strip()), next(iter(found)))
    for file, text in found.items():
        if text.rstrip() != found[used].rstrip():
            status(f"{file} holds another chat template than {used}, which is used")
    return _special_tokens(folder, found[used]) + found[used]


def _template_in(file: Path) -> str | None:
    """The template that a file holds; None if it holds none or does not exist."""
    if not file.is_file():
        return None
    if file.suffix == ".json":
        template = read_json(file).get("chat_template")
        return None if template is None else _default(template, file)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TangoError(f"{file} is not valid UTF-8: {error}", "save it as UTF-8") from error
    if text.startswith("\ufeff"):  # which would be the prompt's first character
        raise TangoError(f"{file} begins with a byte order mark", "save it as UTF-8 without one")
    return text


def _special_tokens(folder: Path, template: str) -> str:
    """Definitions, as Jinja, of the special tokens that a template writes by their names.

    Raises:
        TangoError: It uses the name of a token that no file gives.
    """
    given: dict[str, tuple[Path, object]] = {}
    for file in (folder / name for name in reversed(_TOKEN_FILES)):
        data = _read_if_there(file)
        more = data.get("extra_special_tokens")
        tokens = {role: data[role] for role in _ROLES if role in data} | (more if isinstance(more, dict) else {})
        given |= {name: (file, token) for name, token in tokens.items() if name.isidentifier()}
    defined = ""
    for name in sorted({*_ROLES, *given}):
        if not re.search(rf"\b{name}\b", template):
            continue
        if name not in given:
            file = folder / _TOKEN_FILES[0]
            raise TangoError(
                f"the chat template of {folder} uses {name}, which {file.name} does not name",
                f"write {name} into {file}: null if there is none",
            )
        file, token = given[name]
        if token is not None:
            defined += f"{{% set {name} = {json.dumps(_token_text(token, file))} %}}"
    return defined and f"{defined}\n"  # the newline is dropped, and what follows begins a line as before


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
