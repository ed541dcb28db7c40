"""Videos and what is asked about them: generated clips, or a folder of videos with a questions.jsonl."""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tango_calibration.data.questions import Question
from tango_calibration.data.synthetic import Clip, Split, make_clip
from tango_plugins import TangoError
from tango_runtime.video import Source, TimedFrame

QUESTIONS = "questions.jsonl"

#: Of a generated clip.
FEWEST_FRAMES = 8

#: What LLaVA-OneVision's evaluations write behind the options.
INSTRUCTION = "Answer with the option's letter from the given choices directly."

_KEYS = {"video": str, "question": str, "answer": str, "options": list, "type": str, "id": str}
_REQUIRED = ("video", "question", "answer")

#: Marks that belong to a number: its sign, the point before or within it, a colon within it.
_OF_A_NUMBER = re.compile(r"(?<!\w)-(?=\.?\d)|(?<![\w.])\.(?=\d)|(?<=\d)[.:](?=\d)")


@dataclass(frozen=True)
class Video:
    """A video and the questions about it.

    Attributes:
        name: What results call it.
        source: What :func:`tango_runtime.video.sample` reads.
        frames: How many frames are sampled of it.
        questions: At least one.
        ids: A name for each question, unique among all videos.
    """

    name: str
    source: Source
    frames: int
    questions: tuple[Question, ...]
    ids: tuple[str, ...]


# Generated clips


@dataclass(frozen=True)
class Rendered(Iterable[TimedFrame]):
    """The frames of a generated clip, rendered whenever they are read; small enough to be sent to a process."""

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
    """Generated clips with their questions; a clip is rendered when it is its turn.

    Args:
        count: Clips, below a million.
        seed: Clips of different seeds have nothing in common.
        questions: Most questions about one clip; a clip that supports none is left out.
        frames: Frames of every clip; None lets each clip have its own number.
        split: Of the synthetic world.

    Raises:
        TangoError: So few frames do not hold what the questions are about.
    """
    if frames is not None and frames < FEWEST_FRAMES:
        raise TangoError(f"a generated clip has at least {FEWEST_FRAMES} frames", f"--frames {FEWEST_FRAMES} or more")
    videos = []
    for i in range(count):
        source = Rendered(seed * 1_000_000 + i, split, frames)
        clip = source.clip()
        asked = tuple(clip.questions(np.random.default_rng((seed, i)), questions))
        name = f"{split}-{source.seed}" + (f"-{frames}f" if frames else "")  # with another number, another clip
        if asked:
            videos.append(Video(name, source, len(clip.seconds), asked, _numbered(name, asked)))
    return videos


# A folder


def read_folder(folder: Path, frames: int) -> list[Video]:
    """Reads a folder of videos with a questions.jsonl; docs/evaluation.md describes the format.

    Everything but the content of the videos is checked here.

    Args:
        folder: It holds questions.jsonl; the paths in there are relative to it.
        frames: Frames sampled of every video.

    Returns:
        The videos in the order in which they first come up.

    Raises:
        TangoError: The file is missing or has no questions, or a line is wrong; the message names it.
    """
    file = folder / QUESTIONS
    if not file.is_file():
        raise TangoError(f"there is no {file}", "write one as docs/evaluation.md describes")
    asked: dict[Path, tuple[str, list[tuple[str, Question]]]] = {}  # a/b and ./a/b are the same video
    lines: dict[str, int] = {}
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        found = _parse(line, where)
        video = folder / found["video"]
        if not video.exists():
            raise TangoError(f"{where}: there is no video {video}", f"paths are relative to {folder}")
        name, known = asked.setdefault(video.resolve(), (found["video"], []))
        key = found.get("id", f"{name}#{len(known)}")
        if key in lines:
            raise TangoError(f"{where}: the id {key!r} is that of line {lines[key]}", "give every question its own")
        lines[key] = number
        known.append((key, _question(found, where)))
    if not asked:
        raise TangoError(f"{file} has no questions", "write at least one line")
    return [
        Video(name, folder / name, frames, tuple(q for _, q in pairs), tuple(key for key, _ in pairs))
        for name, pairs in asked.values()
    ]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TangoError(f"{file} is no UTF-8 text: {error}", "save it as UTF-8") from error


def _parse(line: str, where: str) -> dict[str, Any]:
    """One line as an object whose keys and their types are right."""
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TangoError(f"{where} is not JSON: {error}", "write one object per line") from error
    if not isinstance(found, dict):
        raise TangoError(f"{where} is no object", 'write {"video": …, "question": …, "answer": …}')
    for key in _REQUIRED:
        if key not in found:
            raise TangoError(f"{where} lacks {key!r}", f"a line needs {', '.join(_REQUIRED)}")
    for key, value in found.items():
        if key not in _KEYS:
            raise TangoError(f"{where} has an unknown key {key!r}", f"known are {', '.join(_KEYS)}")
        texts = value if isinstance(value, list) else [value]
        if not isinstance(value, _KEYS[key]) or not all(isinstance(text, str) and text.strip() for text in texts):
            wanted = "a list of texts" if _KEYS[key] is list else "a text"
            raise TangoError(f"{where}: {key} is {json.dumps(value)[:60]}", f"it must be {wanted}, none of them empty")
    return found


def _question(found: dict[str, Any], where: str) -> Question:
    question = Question(
        found.get("type", "question"), found["question"], found["answer"], tuple(found.get("options", ()))
    )
    for text in question.options or [question.answer]:
        if not normalize(text):
            raise TangoError(
                f"{where}: {text!r} is nothing but punctuation", "give an answer that has words or numbers"
            )
    if not question.options:
        return question
    different = {normalize(option) for option in question.options}
    if not 2 <= len(different) == len(question.options) <= len(string.ascii_uppercase):
        raise TangoError(
            f"{where}: options are {list(question.options)}"[:300],
            "give 2 to 26 that differ by more than case, punctuation and articles",
        )
    letters = string.ascii_uppercase[: len(question.options)]
    answer = question.answer
    if answer not in question.options and len(answer) == 1 and answer.upper() in letters:
        answer = question.options[letters.index(answer.upper())]
    if answer not in question.options:
        raise TangoError(f"{where}: the answer {answer!r} is not among the options", "give an option's text or letter")
    return replace(question, text=multiple_choice(question.text, question.options), answer=answer)


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """A question with lettered options, as LLaVA-OneVision's evaluations write it."""
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question, *lines, INSTRUCTION])


# Judging


def is_correct(question: Question, answer: str) -> bool:
    """Whether an answer is the right one: the right option, or the right text as it is or after :func:`normalize`."""
    if question.options:
        return option_of(answer, question.options) == question.answer
    return _bare(answer) == _bare(question.answer) or normalize(answer) == normalize(question.answer) != ""


def option_of(answer: str, options: Sequence[str]) -> str | None:
    """The option that an answer names. The first rule that finds one counts; where it finds several, none is named.

    1. The whole answer is an option's text, whatever the case.
    2. The answer begins with an option's letter, either case, that ends it or has one of ``. ) :`` behind it; a
       bracket may stand before it: ``B``, ``b.``, ``(B) red``. Unless that option's text is all that follows, other
       capital letters that end it or have one of ``. ) : ,`` behind them are found too.
    3. An option's text stands in the answer as whole words, both normalised, and not within a longer one's. A text
       behind ``not`` names none, nor does a ``no`` with a word behind it (``no idea``).
    4. A capital letter of an option stands alone in the answer; an A with a small word behind it is an article, unless
       that is ``and`` or ``or``.
    """
    letters = dict(zip(string.ascii_uppercase, options, strict=False))
    for rule in (_as_text, _at_the_beginning, _within, _as_letter):
        if found := rule(answer, letters):
            return found.pop() if len(found) == 1 else None
    return None


def _as_text(answer: str, letters: Mapping[str, str]) -> set[str]:
    return {option for option in letters.values() if _bare(option) == _bare(answer)}


def _at_the_beginning(answer: str, letters: Mapping[str, str]) -> set[str]:
    begins = re.match(r"\s*\(?([A-Za-z])(?:[.):]|\s*$)", answer)
    if not begins or begins[1].upper() not in letters:
        return set()
    option, rest = letters[begins[1].upper()], answer[begins.end() :]
    others = [] if normalize(rest) == normalize(option) else re.findall(r"\b([A-Z])(?:[.):,]|\s*$)", rest)
    return {option, *(letters[other] for other in others if other in letters)}


def _within(answer: str, letters: Mapping[str, str]) -> set[str]:
    words = normalize(answer)
    found: set[str] = set()
    for text, option in sorted(((normalize(o), o) for o in letters.values()), key=lambda pair: -len(pair[0])):
        words, times = re.subn(rf"(?<!\S){re.escape(text)}(?!\S)", "|", words)
        if times and (text != "no" or re.search(r"\bno\b(?!\s+\w)", answer, re.IGNORECASE)):
            found.add(option)
    return set() if "not |" in words else found


def _as_letter(answer: str, letters: Mapping[str, str]) -> set[str]:
    alone = re.findall(r"\bA\b(?!\s+(?!and\b|or\b)[a-z])|\b[B-Z]\b", answer)
    return {letters[letter] for letter in alone if letter in letters}


def normalize(text: str) -> str:
    """Small letters, single spaces, no articles (unless nothing else is left), no punctuation but that of numbers."""
    text = _bare(text).replace("'", "")
    kept = {mark.start() for mark in _OF_A_NUMBER.finditer(text)}
    words = "".join(
        " " if unicodedata.category(c)[0] == "P" and i not in kept else c for i, c in enumerate(text)
    ).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def _bare(text: str) -> str:
    """Small letters, nothing around them, and one apostrophe and one minus where Unicode has several."""
    return text.strip().casefold().replace("’", "'").replace("−", "-")


def _numbered(name: str, questions: Sequence[Question]) -> tuple[str, ...]:
    return tuple(f"{name}#{i}" for i in range(len(questions)))
