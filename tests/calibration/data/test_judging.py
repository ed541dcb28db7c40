"""Which answers are correct."""

from __future__ import annotations

import pytest

from tango_calibration.data.judging import is_correct, normalize, option_of
from tango_calibration.data.questions import Question

OPTIONS = ("red", "dark red", "a blue ring", "It is hidden")


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", "dark red"),
        ("b", "dark red"),
        (" (C) ", "a blue ring"),
        ("D. It is hidden", "It is hidden"),
        ("A) dark red", "red"),  # a leading letter precedes a text
        ("E", None),
        ("red", "red"),
        ("It is Dark-Red.", "dark red"),  # not the red inside it
        ("dark red dark red", "dark red"),
        ("the red one, not the dark red one", None),
        ("not red", None),
        ("reddish", None),
        ("Blue ring!", "a blue ring"),
        ("The answer is B", "dark red"),
        ("Option C is right", "a blue ring"),
        ("A man is seen", None),  # an article
        ("It is A", "red"),
        ("A, because of it", "red"),
        ("C, B, A", None),
        ("A, B or C", None),
        ("A or B", None),
        ("A. B. C.", None),
        ("A) or B)", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_option_that_an_answer_names(answer, option):
    assert option_of(answer, OPTIONS) == option
    assert is_correct(Question("q", "?", "red", OPTIONS), answer) == (option == "red")


@pytest.mark.parametrize(
    ("answer", "options", "option"),
    [
        ("no idea", ("yes", "no"), None),
        ("No.", ("yes", "no"), "no"),
        ("No, it is not", ("yes", "no"), "no"),
        ("-5", ("5", "-5"), "-5"),
        ("It is −5.", ("5", "-5"), "-5"),
        ("1.5", ("1 5", "1.5"), "1.5"),
        ("at 12:30", ("12:30", "12"), "12:30"),
        ("not red, it is blue", ("red", "blue"), None),
        ("A", ("B", "A"), "A"),  # a text before a letter
        ("A. vitamin C.", ("Vitamin C", "Vitamin A", "none"), "Vitamin C"),
    ],
)
def test_an_answer_names_one_option(answer, options, option):
    assert option_of(answer, options) == option


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("Top-left.", "top left"),
        ("the  Red\nstar", "red star"),
        ("a", "A"),
        ("Don’t", "don't"),
        ("«two»", "two"),
        ("-1.5.", "−1.5"),
    ],
)
def test_normalization(answer, same):
    assert normalize(answer) == normalize(same)
    assert is_correct(Question("q", "?", same), answer)


@pytest.mark.parametrize(
    ("answer", "correct"), [("5", "-5"), ("1 5", "1.5"), ("5", ".5"), ("1230", "12:30"), ("", "?!"), ("-", "+")]
)
def test_other_answers_are_wrong(answer, correct):
    assert is_correct(Question("q", "?", correct), correct)
    assert not is_correct(Question("q", "?", correct), answer)


@pytest.mark.parametrize("answer", ["red", "red star two", "star red", ""])
def test_an_open_answer_must_be_complete(answer):
    assert not is_correct(Question("q", "?", "red star"), answer)
