"""Videos with questions, from folders and generated."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from tango_calibration.data.dataset import read_folder, synthetic
from tango_calibration.data.questions import Question
from tango_plugins import TangoError
from tango_runtime.batch.questions import INSTRUCTION
from tango_runtime.video import sample


@pytest.fixture
def folder(tmp_path):
    """``folder(line, …)``: a folder with videos a and b and these lines, dicts or strings."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / name / f"{i}.png")

    def write(*lines):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "questions.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        return tmp_path

    return write


def line(**changes):
    return {"video": "a", "question": "What color?", "answer": "red"} | changes


def test_a_folder_is_read(folder):
    found = read_folder(
        folder(
            line(),
            line(video="b", id="mine", type="hue"),
            "",
            line(question="Wie heißt er?", answer="Jürgen"),
            line(video="b", options=["red", "green"], answer="b"),
        ),
        frames=2,
    )
    assert [(video.name, video.frames, video.ids) for video in found] == [
        ("a", 2, ("a#0", "a#1")),
        ("b", 2, ("mine", "b#1")),
    ]
    first, german, hue, choice = (question for video in found for question in video.questions)
    assert first == Question("question", "What color?", "red")
    assert (hue.type, german.answer) == ("hue", "Jürgen")
    assert choice == Question("question", f"What color?\nA. red\nB. green\n{INSTRUCTION}", "green", ("red", "green"))
    assert len(list(sample(found[0].source, found[0].frames))) == 2


def test_different_paths_of_one_video(folder):
    [video] = read_folder(folder(line(), line(video="./a"), line(video="b/../a")), 1)
    assert (video.name, video.ids) == ("a", ("a#0", "a#1", "a#2"))


def test_an_option_that_is_a_letter_precedes_the_letter(folder):
    [video] = read_folder(folder(line(options=["B", "A"], answer="A")), 1)
    assert video.questions[0].answer == "A"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is not an object"),
        ('{"video": "a", "video": "b"}', 'line 2 is not JSON: an object has the key "video" twice'),
        ({"video": "a", "question": "?"}, "line 2 has no 'answer'"),
        (line(color="red"), "line 2 has an unknown key 'color'"),
        (line(answer=3), "line 2: answer is 3"),
        (line(question=" "), "line 2: question is"),
        (line(options="red"), "line 2: options is"),
        (line(options=["red", 1]), "line 2: options is"),
        (line(answer="a\ud83d"), "line 2: answer is"),
        (line(question="\udcff"), "line 2: question is"),
        (line(type="\ud83d"), "line 2: type is"),
        (line(id="\ud83d"), "line 2: id is"),
        (line(video="\udcff"), "line 2: video is"),
        (line(options=["red", "\ud83d"]), "line 2: options is"),
        (line(answer=float("nan")), "line 2: answer is NaN"),
        (line(video="a\0"), "line 2: there is no video"),
        ('{"id": ' + "9" * 5000 + "}", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"id": ' + "[" * 900 + "]" * 900 + "}", "line 2"),
        (line(video="c"), "line 2: there is no video .*c"),
        (line(options=["green", "blue"]), "line 2: the answer 'red' is not one of the options"),
        (line(options=["green", "blue"], answer="C"), "line 2: the answer 'C' is not one of the options"),
        (line(options=["red"]), "line 2: options are"),
        (line(options=["red", "red"]), "line 2: options are"),
        (line(options=["red", "The red."]), "line 2: options are"),
        (line(options=["red", "?!"]), "line 2: '\\?!' has only punctuation"),
        (line(answer="…"), "line 2: '…' has only punctuation"),
        (line(options=[f"o{i}" for i in range(27)], answer="o1"), "line 2: options are"),
        (line(id="first"), "line 2: the id 'first' is already used in line 1"),
    ],
)
def test_an_invalid_line_is_named(folder, wrong, message):
    with pytest.raises(TangoError, match=message):
        read_folder(folder(line(id="first"), wrong), 1)


def test_a_folder_without_questions_is_rejected(folder, tmp_path):
    with pytest.raises(TangoError, match=r"there is no .*questions.jsonl"):
        read_folder(tmp_path, 1)
    with pytest.raises(TangoError, match="has no questions"):
        read_folder(folder("", "  "), 1)
    (tmp_path / "questions.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(TangoError, match="is not JSON: 'utf-8' codec"):
        read_folder(tmp_path, 1)


def test_generated_clips_depend_on_the_seed():
    first, again, other = synthetic(2, frames=8), synthetic(2, frames=8), synthetic(2, seed=1, frames=8)
    assert first == again
    assert not {video.name for video in first} & {video.name for video in other}
    for video in first:
        assert 0 < len(video.questions) == len(video.ids) <= 8
        assert len(set(video.ids)) == len(video.ids)


def test_a_generated_clip_is_rendered_when_it_is_read():
    [video] = synthetic(1, frames=8)
    sent = pickle.dumps(video)
    assert len(sent) < 10_000
    frames = list(sample(pickle.loads(sent).source, video.frames))
    clip = video.source.clip()
    np.testing.assert_array_equal([frame for _, frame in frames], clip.render())
    np.testing.assert_allclose([seconds for seconds, _ in frames], clip.seconds - clip.seconds[0])


def test_generated_clips_have_a_minimum_length():
    with pytest.raises(TangoError, match="at least 8 frames"):
        synthetic(1, frames=7)


def test_clips_of_other_lengths_have_other_names():
    names = [video.name for frames in (8, 16, None) for video in synthetic(1, frames=frames)]
    assert len(set(names)) == 3


def test_clips_have_different_lengths_by_default():
    assert len({video.frames for video in synthetic(12)}) > 1
