"""What is asked about a video."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question about a video and its answer.

    Attributes:
        type: What it asks for, such as "colour" or "where"; results are given per type.
        text: The question as the model reads it.
        answer: The right answer.
        options: What may be answered, for multiple choice; empty for an open question, judged by exact match.
        tags: What it is about: "small", "brief", "held-out" and the like.
    """

    type: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
