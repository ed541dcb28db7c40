"""Answers of `tango batch`, scored."""

from __future__ import annotations

import json
import math

import pytest

from tango_calibration.data.dataset import read_folder
from tango_calibration.evaluation import results
from tango_calibration.evaluation.answers import read_answers, records_of
from tango_calibration.evaluation.evaluate import ALL, BundleEvaluator, Trial, evaluate
from tango_plugins import TangoError
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main

QUESTIONS = [
    {"video": "a.mp4", "question": "Which?", "options": ["red", "green"], "answer": "B", "type": "color", "id": "one"},
    {"video": "b.mp4", "question": "What?", "answer": "a ball", "id": "two"},
    {"video": "a.mp4", "question": "Where?", "answer": "left"},
]
KEYS = ["one", "two", "a.mp4#1"]


@pytest.fixture
def data(tmp_path):
    """A folder with a questions.jsonl and no videos."""
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))
    return tmp_path


@pytest.fixture
def texts(data):
    videos = read_folder(data, 1, videos=False)
    return {key: q.text for video in videos for key, q in zip(video.ids, video.questions, strict=True)}


@pytest.fixture
def answers(data, texts):
    """``answers(*(id, answer, ratio), name=…, bundle=…)``: a file of answers."""

    def write(*given, name="answers.jsonl", bundle="small", settings="s"):
        lines = []
        for key, answer, ratio in given:
            line = {"id": key, "video": "v", "question": texts[key], "answer": answer, "finish": "stop"}
            line |= {"bundle": bundle, "retention_ratio": ratio, "kept": 3, "total": 10, "settings": settings}
            lines.append(f"{json.dumps(line)}\n")
        (data / name).write_text("".join(lines))
        return data / name

    return write


@pytest.fixture
def score(data, capsys):
    """``score(*files, *options)``: exit code, standard output, standard error of `tango evaluate --answers`."""

    def call(*arguments):
        code = main(["evaluate", "--data", str(data), "--answers", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_answers_are_judged_and_compared(answers, data):
    pruned = answers(("one", "b.", 0.1), ("two", "ball", 0.1), ("a.mp4#1", "right", 0.1))
    whole = answers(*((key, "nothing", None) for key in KEYS), name="whole.jsonl")
    mine = read_answers([pruned, whole])["small"]
    records, left_out = records_of(mine, read_folder(data, 1, videos=False))
    assert left_out == []
    assert [(r.question, r.trial, r.correct) for r in records[:3]] == [
        (k, ALL, False) for k in ("one", "a.mp4#1", "two")
    ]
    tango = {r.question: r for r in records[3:]}
    assert {key: r.correct for key, r in tango.items()} == {"one": True, "two": True, "a.mp4#1": False}
    assert {(r.trial, r.kept, r.total, math.isnan(r.prefill_ms)) for r in records[3:]} == {
        (Trial("tango", 0.1), 3, 10, True)
    }
    assert tango["one"].type == "color"


def test_the_command_prints_scores_and_writes_results(answers, score, data):
    file = answers(("one", "B", 0.1), ("two", "no", 0.1), ("a.mp4#1", "left", 0.1))
    code, out, _ = score(file, "--output", data / "results")
    assert code == 0
    assert out.startswith("# small\n")
    assert "66.7 [" in out
    assert "nan" not in out
    assert len(results.read(data / "results/results.json")) == 3


def test_a_question_without_an_answer_is_left_out(answers, score):
    code, out, err = score(answers(("one", "B", 0.1), ("two", "no", 0.1), ("one", "B", 0.2)))
    assert code == 1
    assert "small: 2 questions without an answer in every trial are left out" in err
    assert "100.0" in out


def test_each_bundle_has_its_scores(answers, score):
    files = [answers(*((k, "B", 0.1) for k in KEYS), name=name, bundle=name, settings=name) for name in ("x", "y")]
    code, out, _ = score(*files)
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("# ")] == ["# x", "# y"]


def test_scores_of_answers_are_those_of_the_evaluation(tiny_bundle, data, clip, score):
    for name in ("a.mp4", "b.mp4"):
        (data / name).symlink_to(clip)
    (data / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [QUESTIONS[0], QUESTIONS[2]]))
    output = data / "answers.jsonl"
    options = ["--max-new-tokens", "4", "--retention-ratio", "0.25", "--decoders", "0"]
    assert main(["batch", str(tiny_bundle), str(data / "questions.jsonl"), "--output", str(output), *options]) == 0
    videos, params = read_folder(data, 4), Bundle.load(tiny_bundle).manifest.params
    wanted = evaluate(BundleEvaluator(tiny_bundle, max_new_tokens=4), videos, [Trial("tango", 0.25)], params)
    found, _ = records_of(read_answers([output])[tiny_bundle.name], videos)
    assert [(r.question, r.answer.strip(), r.correct, r.kept, r.total) for r in found] == [
        (r.question, r.answer, r.correct, r.kept, r.total) for r in wanted
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [("{}", "line 1 has no 'id'"), ("no", "line 1 is not JSON"), ("", "the files have no answers")],
)
def test_what_holds_no_answers_is_named(score, data, line, error):
    (data / "answers.jsonl").write_text(line)
    code, _, err = score(data / "answers.jsonl")
    assert code == 2
    assert error in err


def test_answers_that_cannot_be_scored_together_are_refused(answers, score, data):
    one, other = (answers(("one", "B", 0.1), name=name, settings=name) for name in ("x.jsonl", "y.jsonl"))
    assert "answered with other settings than before" in score(one, other)[2]
    assert "answered twice at 0.1" in score(one, one)[2]
    one.write_text(one.read_text().replace("Which?", "Why?"))
    assert "is to another question" in score(one)[2]
    assert main(["evaluate", "bundle", "--answers", str(one)]) == 2
    assert main(["evaluate"]) == 2


def test_a_table_of_questions_needs_no_folder(data, answers, capsys):
    rows = [row | {"extra": 1} for row in QUESTIONS]
    (data / "benchmark.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    file = answers(*((key, "B", 0.1) for key in KEYS))
    assert main(["evaluate", "--data", str(data / "benchmark.jsonl"), "--answers", str(file)]) == 0
    (data / "benchmark.jsonl").rename(data / "questions.jsonl")
    with pytest.raises(TangoError, match="unknown key 'extra'"):
        read_folder(data, 1, videos=False)
