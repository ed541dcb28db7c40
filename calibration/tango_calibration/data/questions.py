"""Questions about videos."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question about a video, with its answer.

    Attributes:
        type: Its type, such as "color" or "where"; results are given per type.
        text: The question as the model reads it.
        answer: The correct answer.
        options: The options of a multiple-choice question; empty for an open question, which is judged by exact match.
        tags: Properties of its subject: "small", "brief", "held-out" and so on.
    """

    type: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
