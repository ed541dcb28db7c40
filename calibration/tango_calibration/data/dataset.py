"""Videos with questions: generated clips, or a folder of videos with a questions.jsonl."""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tango_calibration.data.judging import normalize
from tango_calibration.data.questions import Question
from tango_calibration.data.synthetic import Clip, Split, make_clip
from tango_calibration.data.synthetic.scene import SIDE
from tango_plugins import TangoError
from tango_runtime.batch.questions import is_text, multiple_choice
from tango_runtime.batch.tables import STATE, read_rows
from tango_runtime.util.jsonschema import shown
from tango_runtime.video import Source, TimedFrame, open_source

QUESTIONS = "questions.jsonl"

#: Stands for generated clips where a folder of videos is expected.
SYNTHETIC = "synthetic"

#: Minimum number of frames of a generated clip.
MIN_FRAMES = 8

_KEYS = {"video": str, "question": str, "answer": str, "options": list, "type": str, "id": str}
_REQUIRED = ("video", "question", "answer")


@dataclass(frozen=True)
class Video:
    """A video and the questions about it.

    Attributes:
        name: Its name in results.
        source: What :func:`tango_runtime.video.sample` reads.
        frames: Number of frames sampled from it.
        questions: At least one question.
        ids: An id for each question, unique among all videos.
    """

    name: str
    source: Source
    frames: int
    questions: tuple[Question, ...]
    ids: tuple[str, ...]

    def only(self, ids: Collection[str]) -> Video:
        """The same video with some of its questions, perhaps none."""
        pairs = [(key, question) for key, question in zip(self.ids, self.questions, strict=True) if key in ids]
        return replace(self, ids=tuple(key for key, _ in pairs), questions=tuple(question for _, question in pairs))

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) of its frames in pixels; None where unknown."""
        if isinstance(self.source, Rendered):  # known without rendering
            return SIDE, SIDE
        return open_source(self.source).frame_size


# Generated clips


@dataclass(frozen=True)
class Rendered(Iterable[TimedFrame]):
    """The frames of a generated clip, rendered each time they are read, so that pickles are small."""

    seed: int
    split: Split
    frames: int | None

    def clip(self) -> Clip:
        """The clip."""
        return make_clip(self.seed, self.split, self.frames)

    def __iter__(self) -> Iterator[TimedFrame]:
        clip = self.clip()
        return zip(clip.seconds.tolist(), clip.render(), strict=True)


def synthetic(
    count: int, *, seed: int = 0, questions: int = 8, frames: int | None = None, split: Split = "test"
) -> list[Video]:
    """Generated clips with their questions; a clip is rendered when it is read.

    Args:
        count: Number of clips, below a million.
        seed: Seed of the clips; different seeds give different clips.
        questions: Maximum number of questions about one clip; a clip without any is left out.
        frames: Frames of every clip; None lets each clip have its own number.
        split: Split of the synthetic data.

    Raises:
        TangoError: There are too few frames for the questions.
    """
    if frames is not None and frames < MIN_FRAMES:
        raise TangoError(f"a generated clip has at least {MIN_FRAMES} frames", f"use --frames {MIN_FRAMES} or more")
    videos = []
    for i in range(count):
        source = Rendered(seed * 1_000_000 + i, split, frames)
        clip = source.clip()
        asked = tuple(clip.questions(np.random.default_rng((seed, i)), questions))
        # The number of frames changes the clip, so the name has it.
        name = f"{split}-{source.seed}" + (f"-{frames}f" if frames else "")
        if asked:
            videos.append(Video(name, source, len(clip.seconds), asked, _numbered(name, asked)))
    return videos


# A folder


def read_folder(data: Path, frames: int, *, videos: bool = True) -> list[Video]:
    """Reads a folder of videos with a questions.jsonl, or another table; docs/guide/evaluate.md describes the format.

    Everything except the content of the videos is checked here.

    Args:
        data: A folder with a questions.jsonl, or a table that :func:`tango_runtime.batch.tables.read_rows` reads. Paths
            of videos are relative to its folder. In a questions.jsonl every key must be known.
        frames: Frames sampled from every video.
        videos: Reject a missing video.

    Returns:
        The videos in the order of their first questions.

    Raises:
        TangoError: The file is missing or has no questions, or a line is invalid; the message names it.
    """
    whole = data.is_dir() and (data / STATE).is_file()  # a table of several files
    file = data / QUESTIONS if data.is_dir() and not whole else data
    folder = data if data.is_dir() else data.parent
    if not file.exists():
        raise TangoError(f"there is no {file}", "write one as docs/guide/evaluate.md describes")
    asked: dict[Path, tuple[str, list[tuple[str, Question]]]] = {}  # a/b and ./a/b are the same video
    lines: dict[str, int] = {}
    for number, row in read_rows(file, _KEYS):
        where = f"{file} line {number}"
        found = _checked(row, where, strict=file.name == QUESTIONS)
        video = folder / found["video"]
        if videos and not video.exists():
            raise TangoError(f"{where}: there is no video {video}", f"paths are relative to {folder}")
        name, known = asked.setdefault(video.resolve(), (found["video"], []))
        key = found.get("id", f"{name}#{len(known)}")
        if key in lines:
            raise TangoError(
                f"{where}: the id {key!r} is already used in line {lines[key]}", "give every question its own id"
            )
        lines[key] = number
        known.append((key, _question(found, where)))
    if not asked:
        raise TangoError(f"{file} has no questions", "write at least one line")
    return [
        Video(name, folder / name, frames, tuple(q for _, q in pairs), tuple(key for key, _ in pairs))
        for name, pairs in asked.values()
    ]


def _checked(row: dict[str, Any] | TangoError, where: str, *, strict: bool) -> dict[str, Any]:
    """A row with valid keys and types; other keys are dropped, or rejected if ``strict``."""
    if isinstance(row, TangoError):
        raise row
    found = row if strict else {key: value for key, value in row.items() if key in _KEYS and value is not None}
    for key in _REQUIRED:
        if key not in found:
            raise TangoError(f"{where} has no {key!r}", f"a line needs {', '.join(_REQUIRED)}")
    for key, value in found.items():
        if key not in _KEYS:
            raise TangoError(f"{where} has an unknown key {key!r}", f"valid keys are {', '.join(_KEYS)}")
        texts = value if isinstance(value, list) else [value]
        if not isinstance(value, _KEYS[key]) or not all(map(is_text, texts)):
            wanted = "a list of strings" if _KEYS[key] is list else "a string"
            raise TangoError(f"{where}: {key} is {shown(value)}", f"use {wanted}, not empty and of valid Unicode")
    return found


def _question(found: dict[str, Any], where: str) -> Question:
    question = Question(
        found.get("type", "question"), found["question"], found["answer"], tuple(found.get("options", ()))
    )
    for text in question.options or [question.answer]:
        if not normalize(text):
            raise TangoError(f"{where}: {text!r} has only punctuation", "give an answer with words or numbers")
    if not question.options:
        return question
    different = {normalize(option) for option in question.options}
    if not 2 <= len(different) == len(question.options) <= len(string.ascii_uppercase):
        raise TangoError(
            f"{where}: options are {list(question.options)}"[:300],
            "give 2 to 26 options that differ by more than case, punctuation and articles",
        )
    letters = string.ascii_uppercase[: len(question.options)]
    answer = question.answer
    if answer not in question.options and len(answer) == 1 and answer.upper() in letters:
        answer = question.options[letters.index(answer.upper())]
    if answer not in question.options:
        raise TangoError(
            f"{where}: the answer {answer!r} is not one of the options", "give the text or the letter of an option"
        )
    return replace(question, text=multiple_choice(question.text, question.options), answer=answer)


def _numbered(name: str, questions: Sequence[Question]) -> tuple[str, ...]:
    return tuple(f"{name}#{i}" for i in range(len(questions)))
