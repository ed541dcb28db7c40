"""Whether an answer is correct."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence

from tango_calibration.data.questions import Question

#: Marks that belong to a number: a sign, a decimal point, a colon inside it.
_NUMBER_MARKS = re.compile(r"(?<!\w)-(?=\.?\d)|(?<![\w.])\.(?=\d)|(?<=\d)[.:](?=\d)")


def is_correct(question: Question, answer: str) -> bool:
    """Whether an answer is correct: it names the correct option, or equals the correct text, possibly normalized."""
    if question.options:
        return option_of(answer, question.options) == question.answer
    return _bare(answer) == _bare(question.answer) or normalize(answer) == normalize(question.answer) != ""


def option_of(answer: str, options: Sequence[str]) -> str | None:
    """The option that an answer names. The first rule that finds options decides; several options count as none.

    1. The whole answer is the text of an option, in any case.
    2. The answer begins with the letter of an option, in either case, followed by the end or one of ``. ) :``; a
       parenthesis may precede it: ``B``, ``b.``, ``(B) red``. Unless only that option's text follows, capital letters
       followed by the end or one of ``. ) : ,`` count, too.
    3. The answer contains the text of an option as whole words, both normalized, outside the text of a longer option.
       A text after ``not`` does not count, nor does a ``no`` before another word (``no idea``).
    4. The answer contains the capital letter of an option as a word. An A before a lower-case word is an article,
       unless that word is ``and`` or ``or``.
    """
    letters = dict(zip(string.ascii_uppercase, options, strict=False))
    for rule in (_whole_text, _leading_letter, _contained_text, _single_letter):
        if found := rule(answer, letters):
            return found.pop() if len(found) == 1 else None
    return None


def _whole_text(answer: str, letters: Mapping[str, str]) -> set[str]:
    return {option for option in letters.values() if _bare(option) == _bare(answer)}


def _leading_letter(answer: str, letters: Mapping[str, str]) -> set[str]:
    begins = re.match(r"\s*\(?([A-Za-z])(?:[.):]|\s*$)", answer)
    if not begins or begins[1].upper() not in letters:
        return set()
    option, rest = letters[begins[1].upper()], answer[begins.end() :]
    others = [] if normalize(rest) == normalize(option) else re.findall(r"\b([A-Z])(?:[.):,]|\s*$)", rest)
    return {option, *(letters[other] for other in others if other in letters)}


def _contained_text(answer: str, letters: Mapping[str, str]) -> set[str]:
    words = normalize(answer)
    found: set[str] = set()
    for text, option in sorted(((normalize(o), o) for o in letters.values()), key=lambda pair: -len(pair[0])):
        words, times = re.subn(rf"(?<!\S){re.escape(text)}(?!\S)", "|", words)
        if times and (text != "no" or re.search(r"\bno\b(?!\s+\w)", answer, re.IGNORECASE)):
            found.add(option)
    return set() if "not |" in words else found


def _single_letter(answer: str, letters: Mapping[str, str]) -> set[str]:
    alone = re.findall(r"\bA\b(?!\s+(?!and\b|or\b)[a-z])|\b[B-Z]\b", answer)
    return {letters[letter] for letter in alone if letter in letters}


def normalize(text: str) -> str:
    """Lower case, single spaces, no articles (unless nothing else is left), no punctuation except that of numbers."""
    text = _bare(text).replace("'", "")
    number_marks = {mark.start() for mark in _NUMBER_MARKS.finditer(text)}
    words = "".join(
        " " if unicodedata.category(c)[0] == "P" and i not in number_marks else c for i, c in enumerate(text)
    ).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def _bare(text: str) -> str:
    """Lower case, without surrounding space, with one kind of apostrophe and of minus sign."""
    return text.strip().casefold().replace("’", "'").replace("−", "-")
