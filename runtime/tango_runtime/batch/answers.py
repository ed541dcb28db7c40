"""The file of answers: what it holds already, and that it grows by whole lines of one run's settings only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tango_plugins import TangoError
from tango_runtime.batch.questions import AskedVideo, Failure, Id
from tango_runtime.util.files import AppendedFile
from tango_runtime.util.jsonschema import from_json, parse_json

#: What a line begins with.
_BEGINS = b'{"id": '

_NO_ANSWERS = "give a file that tango batch wrote"


@dataclass(frozen=True)
class Answered:
    """A line of the file. Nothing in it depends on when or where it was answered.

    Attributes:
        id: The question's id.
        video: The video, as the table names it.
        question: The question as the model read it.
        answer: The answer.
        finish: Why it ended: ``stop``, ``length`` or ``context``.
        bundle: Name of the bundle's folder.
        retention_ratio: Fraction of the video tokens to be kept, None where nothing was pruned.
        kept: Video tokens that the decoder saw.
        total: Video tokens that the vision graph gave.
        settings: Digest of everything else that an answer depends on: the bundle, the frames, the sampling.
    """

    id: Id
    video: str
    question: str
    answer: str
    finish: str
    bundle: str
    retention_ratio: float | None
    kept: int
    total: int
    settings: str


@dataclass(frozen=True)
class Trial:
    """One way to answer all questions.

    Attributes:
        bundle: Name of the bundle's folder.
        settings: As of :class:`Answered`.
        retention_ratio: Fraction of the video tokens to be kept, None to keep all.
    """

    bundle: str
    settings: str
    retention_ratio: float | None


@dataclass(frozen=True)
class _Asked:
    """What an id asks: a question about a video, whose path may be written in several ways."""

    video: str
    question: str

    @classmethod
    def of(cls, video: str, question: str) -> _Asked:
        return cls(os.path.normpath(video), question)


class AnswerFile:
    """Answers on disk, appended one by one; see :class:`tango_runtime.util.files.AppendedFile`.

    An error before the first answer leaves no file.

    Args:
        path: The file.
        trials: How the questions are answered: the file must hold no others.
        videos: The questions.

    Attributes:
        lines: Number of answers.

    Raises:
        TangoError: As of AppendedFile, or a line is no answer, was answered with other settings, or answers another
            question of the same id, or one about another video.
    """

    def __init__(self, path: Path, trials: Sequence[Trial], videos: Sequence[AskedVideo]) -> None:
        self._file = AppendedFile(path, _BEGINS)
        self._done: set[tuple[Id, Trial]] = set()
        try:
            self._read(
                {trial: trial for trial in trials},
                {question.id: _Asked.of(video.name, question.text) for video in videos for question in video.questions},
            )
        except BaseException:
            self.close()
            raise
        self.lines = len(self._done)

    def has(self, question: Id, trial: Trial) -> bool:
        """Whether a question has its answer."""
        return (question, trial) in self._done

    def append(self, answered: Answered) -> None:
        """Adds an answer; it is there for good when this returns."""
        self._file.append(_line(asdict(answered)))
        self.lines += 1

    def rows(self) -> list[dict[str, Any]]:
        """All answers."""
        return [json.loads(line) for line in self._file.lines()]

    def close(self) -> None:
        """Lets other processes append."""
        self._file.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind and not self.lines:  # as where no backend can run
            self._file.path.unlink(missing_ok=True)
        self.close()

    def _read(self, trials: Mapping[Trial, Trial], asked: Mapping[Id, _Asked]) -> None:
        path = self._file.path
        for number, line in enumerate(self._file.lines(), 1):
            where = f"{path} line {number}"
            answered = as_answer(parse_json(line, where, _NO_ANSWERS), where)
            trial = Trial(answered.bundle, answered.settings, answered.retention_ratio)
            if trial not in trials:
                raise TangoError(
                    f"{where} was answered with other settings",
                    "repeat the bundle and the options of the run that began the file, or choose another --output",
                )
            mine = _Asked.of(answered.video, answered.question)
            if (now := asked.get(answered.id, mine)) != mine:
                other = "another question" if now.video == mine.video else f"a question about {answered.video}"
                raise TangoError(f"{where} answers {other} of the id {answered.id!r}", "choose another --output")
            if (answered.id, trial) in self._done:
                raise TangoError(f"{where} answers {answered.id!r} again", "remove one of its lines")
            self._done.add((answered.id, trials[trial]))


class ErrorFile:
    """The questions that could not be answered in the last run, beside the file of answers; none is left without any.

    Args:
        answers: The file of answers.

    Attributes:
        path: The file.
        lines: Number of failures.

    Raises:
        TangoError: As of AppendedFile, or the file holds something else, which is left alone.
    """

    def __init__(self, answers: Path) -> None:
        self.path, self.lines = error_path(answers), 0
        self._file = AppendedFile(self.path, _BEGINS)
        if not all(line.startswith(_BEGINS) and b'"error": ' in line for line in self._file.lines()):
            self._file.close()
            raise TangoError(f"{self.path} holds no errors of tango batch", "move it, or choose another --output")
        self._file.clear()

    def append(self, failure: Failure) -> None:
        """Adds a failure."""
        found = asdict(failure)
        order = ("id", "video", "question", "bundle", "retention_ratio", "line", "message", "hint")
        self._file.append(_line({"error" if name == "message" else name: found[name] for name in order}))
        self.lines += 1

    def close(self) -> None:
        """Removes the file if it is empty."""
        if not self.lines:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> ErrorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def error_path(answers: Path) -> Path:
    """Where the errors of a file of answers are: ``answers.errors.jsonl`` for ``answers.jsonl``."""
    return answers.with_suffix(".errors.jsonl")


def as_answer(row: object, where: str) -> Answered:
    """An answer of a row of a file of answers.

    Raises:
        TangoError: It is none.
    """
    try:
        if isinstance(row, TangoError):
            raise row
        return from_json(Answered, row, where)
    except TangoError as error:
        raise TangoError(error.message, _NO_ANSWERS) from error


def _line(fields: dict[str, Any]) -> bytes:
    # Half a surrogate pair, as a file's name may have, becomes the escape that JSON has for it.
    return f"{json.dumps(fields, ensure_ascii=False)}\n".encode(errors="backslashreplace")
