"""The questions of a batch: rows of a table, grouped by the video that they are about."""

from __future__ import annotations

import os
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from tango_plugins import TangoError
from tango_runtime.batch.tables import read_rows
from tango_runtime.util.jsonschema import shown

#: What LLaVA-OneVision's evaluations write after the options.
INSTRUCTION = "Answer with the option's letter from the given choices directly."

#: Columns of a table of questions.
_COLUMNS = ("video", "question", "id", "options")

#: What identifies a question; a table may have numbers.
Id = str | int


@dataclass(frozen=True)
class Question:
    """A question about a video.

    Attributes:
        id: Its id, unique in the table.
        text: As the model reads it, options included.
        line: Where it stands in the table, from 1.
    """

    id: Id
    text: str
    line: int


@dataclass(frozen=True)
class AskedVideo:
    """A video and the questions about it.

    Attributes:
        name: As the table's first row about it writes it.
        path: Where it is.
        questions: In the order of the table.
    """

    name: str
    path: Path
    questions: tuple[Question, ...]

    def only(self, questions: Sequence[Question]) -> AskedVideo:
        """The same video with some of its questions."""
        return replace(self, questions=tuple(questions))


@dataclass(frozen=True)
class Failure:
    """Why a question has no answer.

    Attributes:
        line: Where it stands in the table.
        message: What is wrong.
        hint: What to do.
        id: Its id, None where its row has none that can be used.
        video: The video as the table names it, None as before.
        question: The question as the model would have read it, None as before.
        bundle: The bundle that failed on it; None where that is not what failed.
        retention_ratio: The fraction to be kept; None where nothing was to be pruned, or that is not what failed.
    """

    line: int
    message: str
    hint: str
    id: Id | None = None
    video: str | None = None
    question: str | None = None
    bundle: str | None = None
    retention_ratio: float | None = None


def read_questions(table: Path, folder: Path | None = None) -> tuple[list[AskedVideo], list[Failure]]:
    """Reads a table of questions; a row that is none fails by itself.

    A row has ``video`` and ``question``. It may have ``options``, which become part of the question as
    :func:`multiple_choice` writes them, and an ``id``; without one it is the video's name and a number. Anything else
    in it is left alone.

    Args:
        table: What :func:`tango_runtime.batch.tables.read_rows` reads.
        folder: What paths of videos are relative to; by default the table's own folder, or the table if it is one.

    Returns:
        The videos in the order of their first questions, and the rows that are no questions.

    Raises:
        TangoError: The table cannot be read, or it is empty.
    """
    root = folder or (table if table.is_dir() else table.parent)
    asked: dict[str, tuple[str, list[Question]]] = {}
    lines: dict[Id, int] = {}
    failures: list[Failure] = []
    for line, row in read_rows(table, _COLUMNS):
        try:
            video, text, given = _fields(row)
        except TangoError as error:
            failures.append(Failure(line, error.message, error.hint, **_names(row)))
            continue
        # a/b and ./a/b are the same video
        name, known = asked.setdefault(os.path.realpath(root / video), (video, []))
        key = given if given is not None else f"{name}#{len(known)}"
        if key in lines:
            message = f"the id {shown(key)} is already used in line {lines[key]}"
            failures.append(Failure(line, message, "give every question its own id", key, video, text))
            continue
        lines[key] = line
        known.append(Question(key, text, line))
    if not asked and not failures:
        raise TangoError(f"{table} has no questions", 'write lines as {"video": …, "question": …}')
    return [AskedVideo(name, Path(path), tuple(known)) for path, (name, known) in asked.items() if known], failures


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """A question with lettered options, as LLaVA-OneVision's evaluations write it."""
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question, *lines, INSTRUCTION])


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that is not empty and can be written as UTF-8: half a surrogate pair cannot."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def _fields(row: dict[str, Any] | TangoError) -> tuple[str, str, Id | None]:
    """Video, question and id of a row.

    Raises:
        TangoError: It does not have them.
    """
    if isinstance(row, TangoError):
        raise row
    video, question, key, options = (row.get(name) for name in _COLUMNS)
    if isinstance(video, dict):  # as datasets decodes its Video feature
        video = video.get("path")
    if is_text(video) and "\0" in video:
        raise TangoError(f"video is {_shown(video)}", "use a path; none has a NUL in it")
    if not is_text(video) or not is_text(question):
        name, value = ("question", question) if is_text(video) else ("video", video)
        raise TangoError(f"{name} is {_shown(value)}", "use text that is not empty and is valid Unicode")
    if key is not None and not is_text(key) and type(key) is not int:
        raise TangoError(f"id is {_shown(key)}", "use text or an integer, or leave it out")
    if not options:
        return video, question, key
    if not (isinstance(options, list) and len(options) <= len(string.ascii_uppercase) and all(map(is_text, options))):
        raise TangoError(f"options is {_shown(options)}", "use a list of at most 26 texts, none of them empty")
    return video, multiple_choice(question, options), key


def _names(row: dict[str, Any] | TangoError) -> dict[str, Any]:
    """What a row that is no question names all the same."""
    if isinstance(row, TangoError):
        return {}
    named = {name: row.get(name) for name in ("id", "video", "question")}
    return {name: value for name, value in named.items() if is_text(value) or (name == "id" and type(value) is int)}


def _shown(value: object) -> str:
    """A cell, cut to fit a line; of what JSON does not have, as a table's time, only the type."""
    try:
        return shown(value)
    except TypeError:
        return f"of type {type(value).__name__}"
