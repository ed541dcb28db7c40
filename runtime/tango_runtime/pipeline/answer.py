"""An answer, and the stream that it comes from."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tango_runtime.video.shape import ClipShape

#: Why an answer ended: a stop token or the end of its JSON, ``max_new_tokens``, or the end of the bundle's context.
Finish = Literal["stop", "length", "context"]


@dataclass
class LiveMoment:
    """The part of a stream that an answer is about.

    Attributes:
        begin: Time of the window's first frame on the stream's clock, in seconds.
        end: Time of its last frame, in seconds.
        frames: Number of frames in the window.
        lag: Seconds from the arrival of the last frame to the first piece of the answer; None for a recording.
        dropped: Number of frames dropped so far, because newer ones had arrived.
        gaps: Number of times that the stream has paused or restarted so far.
    """

    begin: float
    end: float
    frames: int
    lag: float | None
    dropped: int
    gaps: int


@dataclass
class Answer:
    """An answer and what it was read from. It is complete when its stream has ended.

    Attributes:
        question: As asked.
        retention_ratio: Fraction of the video tokens to keep; None if nothing was pruned.
        text: The text of the answer.
        ids: Its token ids, without the stop token.
        finish: Why it ended: ``stop``, ``length`` or ``context``.
        kept: Number of video tokens that the decoder saw, K.
        rows: Number of positions that the video takes in the prompt: the kept tokens and the row ends among them.
        total: Number of video tokens before pruning.
        thinned: Number of rows that the decoder's upper layers saw; None without inner pruning.
        prompt_tokens: Number of positions of the prompt, video tokens included.
        stages: Milliseconds of each stage, in order: ``video`` (decoding and resizing), ``vision``, ``prune`` (unless
            every token is kept), ``prefill`` (up to the first token), ``decode`` (all later tokens). In a session, only
            the first answer has the first three.
        shape: Size of the frames, number of steps, and token grid of a step; None before the answer begins.
        indices: [K] int32, flat index f·L + l of each kept token. f is the step of frames, which is the frame if a step
            is one frame.
        merged: [K] bool, True for a merged context token, False for a token kept as it is.
        segments: [S, 2] int32, first step of frames of each segment and one past the last.
        frames: [F, H, W, 3] uint8, as the vision graph took them. On a GPU backend the memory is pinned, and stays
            pinned as long as the array or a view of it exists.
        seconds: [F] fp32, time of each frame in seconds.
        off: [F] float64, seconds by which each keyframe is later than the frame of exact sampling; None for exact
            sampling.
        salience: [T, L] fp32, salience of each step's tokens.
        aspect: Width over height of the source's frames.
        live: The part of a stream that the answer is about; None for a video.
    """

    question: str
    retention_ratio: float | None
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: Finish = "length"
    kept: int = 0
    rows: int = 0
    thinned: int | None = None
    total: int = 0
    prompt_tokens: int = 0
    shape: ClipShape | None = None
    stages: dict[str, float] = field(default_factory=dict)
    indices: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    merged: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    segments: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    frames: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8))
    seconds: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    off: NDArray[np.float64] | None = None
    salience: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    aspect: float = 1.0
    live: LiveMoment | None = None

    @property
    def sampling(self) -> str:
        """One line that says how the frames were chosen; empty if they are evenly spaced."""
        if self.off is None:
            return ""
        far = np.abs(self.off)
        return f"keyframes, {far.mean():.2f} s on average and {far.max():.2f} s at most from evenly spaced frames"

    @property
    def first_token_ms(self) -> float:
        """Milliseconds to the first token, counted from the first frame, or from the question if it is a later one."""
        return sum(ms for name, ms in self.stages.items() if name != "decode")

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second while decoding; 0 if there was at most one token."""
        decode = self.stages.get("decode", 0.0)
        return 1e3 * max(len(self.ids) - 1, 0) / decode if decode else 0.0


class AnswerStream(Iterator[str]):
    """An iterator over pieces of an answer's text, as they are generated. It is a context manager.

    Attributes:
        answer: The answer, which grows with each piece.
    """

    def __init__(self, answer: Answer, pieces: Generator[str, None, None]) -> None:
        self.answer = answer
        self._pieces = pieces  # some may be empty

    def __next__(self) -> str:
        while not (piece := next(self._pieces)):
            pass
        return piece

    def turn(self) -> str | None:
        """One token more: the text that it completes, which may be empty; None at the end.

        Answers that are written at a time take turns with this, and so share decode steps where the backend can.
        """
        return next(self._pieces, None)

    def close(self) -> None:
        """Ends the answer where it is, and frees its resources."""
        self._pieces.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
