"""Tables of questions: what a row is, how videos are grouped, and in which order they are answered."""

from __future__ import annotations

import json

import pytest

from tango_plugins import TangoError
from tango_runtime.batch.answers import Answered, AnswerFile, Trial
from tango_runtime.batch.questions import read_questions
from tango_runtime.batch.run import missing
from tango_runtime.batch.tables import read_rows

TRIAL = Trial("bundle", "settings", 0.1)


def write(folder, *rows):
    file = folder / "questions.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def row(video, question="Who?", **more):
    return {"video": video, "question": question, **more}


def test_questions_about_one_video_are_together_however_it_is_written(tmp_path):
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.mp4")
    names = ["a.mp4", "b.mp4", "./a.mp4", str(tmp_path / "b.mp4"), "link.mp4"]
    videos, failures = read_questions(write(tmp_path, *(row(name) for name in names)))
    assert not failures
    assert [(video.name, [(q.id, q.line) for q in video.questions]) for video in videos] == [
        ("a.mp4", [("a.mp4#0", 1), ("a.mp4#1", 3), ("a.mp4#2", 5)]),
        ("b.mp4", [("b.mp4#0", 2), ("b.mp4#1", 4)]),
    ]


def test_other_columns_and_blank_lines_are_left_alone(tmp_path):
    file = write(tmp_path, row("a.mp4", answer="red", duration="short", options=None))
    file.write_text(file.read_text() + "\n  \n" + json.dumps(row("a.mp4")))
    videos, failures = read_questions(file)
    assert not failures
    assert [question.line for question in videos[0].questions] == [1, 4]


def test_a_file_of_another_system(tmp_path):
    lines = [json.dumps(row("a.mp4", text)).encode() for text in ("Who?", "What?")]
    (tmp_path / "questions.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    videos, failures = read_questions(tmp_path / "questions.jsonl")
    assert ([question.line for question in videos[0].questions], failures) == ([1, 3], [])


def test_a_number_and_a_text_are_two_ids(tmp_path):
    videos, failures = read_questions(write(tmp_path, row("a", id=1), row("a", id="1")))
    assert [question.id for question in videos[0].questions] == [1, "1"]
    assert not failures


def test_large_files_come_first_and_missing_ones_last(tmp_path):
    for name, size in (("short", 1), ("long", 300), ("middle", 20)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(bytes(100))
    videos, _ = read_questions(write(tmp_path, *map(row, ("none", "short", "long", "images", "middle"))))
    with AnswerFile(tmp_path / "answers.jsonl", [TRIAL], videos) as answers:
        tasks = missing(videos, [TRIAL], answers)
    assert [task.video.name for task in tasks] == ["long", "images", "middle", "short", "none"]


def test_only_what_is_missing_is_asked(tmp_path):
    other = Trial("bundle", "settings", None)
    videos, _ = read_questions(write(tmp_path, row("a"), row("a", "What?"), row("b")))
    with AnswerFile(tmp_path / "answers.jsonl", [TRIAL, other], videos) as answers:
        for key, trial in (("a#0", TRIAL), ("b#0", TRIAL), ("b#0", other)):
            answered = Answered(
                key, key[0], "Who?", "", "stop", trial.bundle, trial.retention_ratio, 1, 2, trial.settings
            )
            answers.append(answered)
    with AnswerFile(tmp_path / "answers.jsonl", [TRIAL, other], videos) as answers:
        (task,) = missing(videos, [TRIAL, other], answers)
    assert [(trial, [question.id for question in asked]) for trial, asked in task.asked] == [
        (TRIAL, ["a#1"]),
        (other, ["a#0", "a#1"]),
    ]
    assert len(task) == 3


def test_there_must_be_a_table(tmp_path):
    with pytest.raises(TangoError, match="there is no"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(TangoError, match=r"has no state\.json"):
        list(read_rows(tmp_path))
