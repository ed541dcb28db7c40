"""Joins the answers that `tango batch` wrote with the correct ones, as records of trials."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from tango_calibration.data.dataset import Video
from tango_calibration.data.judging import is_correct
from tango_calibration.evaluation.evaluate import ALL, Record, Trial
from tango_plugins import TangoError
from tango_runtime.batch.answers import Answered, as_answer
from tango_runtime.batch.tables import read_rows


def read_answers(files: Iterable[Path]) -> dict[str, list[Answered]]:
    """Reads files of answers.

    Returns:
        The answers of each bundle, by its name.

    Raises:
        TangoError: A file cannot be read, a line is not an answer, or answers of one bundle have different settings.
    """
    found: dict[str, list[Answered]] = {}
    for file in files:
        for number, row in read_rows(file):
            answered = as_answer(row, f"{file} line {number}")
            mine = found.setdefault(answered.bundle, [])
            if mine and mine[0].settings != answered.settings:
                raise TangoError(
                    f"{file} line {number}: {answered.bundle} answered with other settings than before",
                    "score files of one bundle and the same options together, others apart",
                )
            mine.append(answered)
    return found


def records_of(answers: Sequence[Answered], videos: Sequence[Video]) -> tuple[list[Record], list[str]]:
    """Judges the answers of a bundle, as trials of ``tango`` at their retention ratios, or of ``all`` without pruning.

    Questions without an answer in every trial are left out, so that trials can be compared.

    Args:
        answers: The answers.
        videos: The videos, with questions and correct answers.

    Returns:
        The records, without times, and the ids of the questions that are left out.

    Raises:
        TangoError: A question is answered twice, or an answer's question is not the one with its id.
    """
    given: dict[Trial, dict[str, Answered]] = {}
    for answered in answers:
        trial = ALL if answered.retention_ratio is None else Trial("tango", answered.retention_ratio)
        mine = given.setdefault(trial, {})
        if str(answered.id) in mine:
            raise TangoError(f"{answered.id!r} is answered twice at {trial.retention_ratio:g}", "give each file once")
        mine[str(answered.id)] = answered
    asked = [
        (video, key, question) for video in videos for key, question in zip(video.ids, video.questions, strict=True)
    ]
    left_out = dict.fromkeys(key for _, key, _ in asked if not all(key in mine for mine in given.values()))
    records = []
    for trial, mine in sorted(given.items(), key=lambda item: (item[0] != ALL, item[0])):
        for video, key, question in asked:
            if key in left_out:
                continue
            answered = mine[key]
            if answered.question != question.text:
                raise TangoError(f"the answer {key!r} is to another question", "score the answers with their own data")
            correct = is_correct(question, answered.answer)
            about = video.name, key, question.text, question.type, question.tags, trial, answered.answer, correct
            records.append(Record(*about, answered.kept, answered.total, math.nan, math.nan))
    return records, list(left_out)
