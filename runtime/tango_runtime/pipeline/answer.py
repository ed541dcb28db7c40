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
    """Which part of a stream an answer is about.

    Attributes:
        begin: Seconds of the window's first frame on the stream's clock.
        end: Seconds of its last.
        frames: Frames in it.
        lag: Seconds from the arrival of its last frame to the first piece of the answer; None for a recording.
        dropped: Frames of the stream that were given up so far, because newer ones had come.
        gaps: Times so far that the stream paused or began anew.
    """

    begin: float
    end: float
    frames: int
    lag: float | None
    dropped: int
    gaps: int


@dataclass
class Answer:
    """An answer and what it was read from; complete when its stream has ended.

    Attributes:
        question: As asked.
        retention_ratio: Fraction of the video tokens to be kept, None where nothing was pruned.
        text: The answer.
        ids: Its token ids, without a stop token.
        finish: Why it ended.
        kept: Video tokens that the decoder saw, K.
        rows: Positions that the video takes in the prompt: its kept tokens, and the row ends among them.
        total: Video tokens that the vision graph gave.
        thinned: Those of them that the decoder's upper layers saw; None where every layer saw all.
        prompt_tokens: Positions of the prompt, video tokens included.
        stages: Milliseconds of each stage, in order: ``video`` (decoding and resizing), ``vision``, ``prune`` (unless
            every token is kept), ``prefill`` (up to the first token), ``decode`` (all later tokens). Of a session,
            only the first answer has the first three.
        shape: The frames' size, their steps, and the grid of the tokens of one step; None before it begins.
        indices: [K] int32, flat index f·L + l of each kept token: f is the step of frames, and the frame where a step
            is one.
        merged: [K] bool, True for a merged context token, False for one kept as it is.
        segments: [S, 2] int32, first step of frames and one past the last.
        frames: [F, H, W, 3] uint8, as the vision graph took them. Where that is a GPU, the memory is pinned, and stays
            pinned as long as the array or a view of it is kept.
        seconds: [F] fp32, time of each frame.
        off: [F] float64, seconds by which each keyframe is after the frame of exact sampling; None where that is used.
        salience: [T, L] fp32, of each step's tokens.
        aspect: Width over height of the source's frames.
        live: Which part of a stream it is about; None for a video.
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
        """How the frames were chosen, one line; empty where they are evenly spaced."""
        if self.off is None:
            return ""
        far = np.abs(self.off)
        return f"keyframes, {far.mean():.2f} s on average and {far.max():.2f} s at most from evenly spaced frames"

    @property
    def first_token_ms(self) -> float:
        """Milliseconds from the first frame, or for a later question from the question, to the first token."""
        return sum(ms for name, ms in self.stages.items() if name != "decode")

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second while decoding; 0 where there was one token or none."""
        decode = self.stages.get("decode", 0.0)
        return 1e3 * max(len(self.ids) - 1, 0) / decode if decode else 0.0


class AnswerStream(Iterator[str]):
    """Pieces of an answer's text as they come; :attr:`answer` fills up on the way."""

    def __init__(self, answer: Answer, pieces: Generator[str, None, None]) -> None:
        self.answer = answer
        self._pieces = pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the answer where it is, and frees what it holds; a stream is a context manager, too."""
        self._pieces.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
