"""A stream of frames, encoded as they come, and questions about the last of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from time import monotonic
from types import TracebackType

from tango_plugins import TangoError
from tango_runtime.pipeline.answer import Answer, AnswerStream, LiveMoment
from tango_runtime.pipeline.encoded import EncodedClip
from tango_runtime.pipeline.feed import Feed
from tango_runtime.pipeline.session import Session, finished
from tango_runtime.pipeline.structured import JsonSchema
from tango_runtime.pipeline.window import FrameWindow
from tango_runtime.util.numbers import is_number

_log = logging.getLogger("tango_runtime.live")

#: Seconds without a frame after which a camera is reported.
_PATIENCE = 10.0


class LiveVideo:
    """The newest frames of a stream, and questions about them.

    Frames are encoded when a question is asked or :meth:`take_in` is called. Until then, frames of a camera wait, at
    most as many as the window holds, and newer ones replace the oldest. So memory is constant, and an answer is about
    the newest frames whatever the model's speed. :meth:`tango_runtime.VideoLLM.live` makes it; it is a context manager,
    for one thread.

    Attributes:
        feed: The source of the frames.
        window: The newest frames.
    """

    def __init__(self, feed: Feed, window: FrameWindow, see: Callable[[EncodedClip], Session]) -> None:
        self.feed, self.window, self._see = feed, window, see
        self._session: Session | None = None
        self._seen = -1  # how many frames were encoded when it was made
        self._closed = False

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        json_schema: JsonSchema | None = None,
    ) -> Answer:
        """Answers a question about the window. Arguments and errors are those of :meth:`stream`."""
        return finished(
            self.stream(
                question,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                json_schema=json_schema,
            )
        )

    def stream(
        self,
        question: str,
        *,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        json_schema: JsonSchema | None = None,
    ) -> AnswerStream:
        """Answers a question about the window as it is now, piece by piece.

        Frames of a camera that have arrived are taken in first. If the window is empty, it waits for the first frames,
        or reads the first window of a recording.

        Args:
            question: The question, plain text.
            history: Earlier (message, answer) pairs of a chat that the caller keeps.
            max_new_tokens: Maximum number of tokens of the answer.
            temperature: Sampling temperature; 0 is greedy.
            top_p: Probability mass that is sampled from (nucleus sampling), in (0, 1].
            seed: Seed of the sampling.
            json_schema: The answer is JSON that fits this schema (extra ``structured``).

        Raises:
            TangoError: As :meth:`tango_runtime.Session.stream`, or the stream ended before its first step of frames, or
                this is closed.
            Exception: What the source raised.
        """
        if self.feed.live and not self.feed.over:
            self.take_in(0)
        if not self.window.held:
            while not (self.window.held if self.feed.live else self.window.full) and self.take_in():
                pass
        inner = self.session().stream(
            question,
            history=history,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            json_schema=json_schema,
        )
        newest, (begin, end) = self.window.newest, self.window.span
        moment = LiveMoment(begin, end, self.window.held, None, self.feed.dropped, self.window.gaps)
        inner.answer.live = moment
        return AnswerStream(inner.answer, _stamped(inner, moment, newest.at if newest else None))

    def session(self) -> Session:
        """The session about the window as it is. It stays the same until frames are taken in.

        Raises:
            TangoError: There is no complete step of frames, or this is closed.
        """
        self._require_open()
        if self._session is None or self._seen != self.window.encoded:
            self._session, self._seen = None, self.window.encoded  # an answer that is not finished keeps its own
            self._session = self._see(self.window.clip())
        return self._session

    def take_in(self, wait: float | None = None, most: int | None = None) -> bool:
        """Encodes the frames that came: all that wait of a camera, the next one of a recording.

        Args:
            wait: Most seconds to wait for a first one; None for any time, with a warning now and then.
            most: Most frames of a camera; None for all that wait.

        Returns:
            Whether there were any: False where none came in time, or the stream is over.

        Raises:
            TangoError: The backend failed, or this is closed.
            Exception: What the source raised.
        """
        self._require_open()
        arrivals = self.feed.take(_PATIENCE if wait is None else wait, most)
        waited = _PATIENCE
        while not arrivals and wait is None and not self.feed.over:
            _log.warning("the stream: no frame has come for %.0f s", waited)
            arrivals = self.feed.take(_PATIENCE, most)
            waited += _PATIENCE
        self.window.add(arrivals)
        return bool(arrivals)

    def watch(
        self,
        question: str,
        *,
        step: float = 5.0,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        json_schema: JsonSchema | None = None,
    ) -> Iterator[Answer]:
        """Asks the same question again and again.

        Args:
            question: The question, plain text.
            step: Seconds of the stream from one answer to the next. If the model takes longer, steps are skipped.
            max_new_tokens: Maximum number of tokens of an answer.
            temperature: Sampling temperature; 0 is greedy.
            top_p: Probability mass that is sampled from (nucleus sampling), in (0, 1].
            seed: Seed of the sampling.
            json_schema: The answer is JSON that fits this schema (extra ``structured``).

        Yields:
            An answer for every step, and one for the rest when the stream ends.

        Raises:
            TangoError: As :meth:`stream`, or ``step`` is not above 0.
            Exception: What the source raised.
        """
        if not is_number(step) or not 0 < step < math.inf:
            raise TangoError(f"step is {step!r}", "it must be a positive number of seconds")
        due, asked = step, 0
        while True:
            while (more := self.window.elapsed < due) and self.take_in():
                pass
            if self.window.encoded > asked:
                asked = self.window.encoded
                yield finished(
                    self.stream(
                        question,
                        max_new_tokens=max_new_tokens,
                        temperature=temperature,
                        top_p=top_p,
                        seed=seed,
                        json_schema=json_schema,
                    )
                )
            if more and self.feed.over:
                return
            due += step * (1 + math.floor(max(self.window.elapsed - due, 0.0) / step))

    def close(self) -> None:
        """Stops reading the stream, and releases the memory."""
        self._closed = True
        self.feed.close()
        if self._session is not None:
            self._session.close()

    def __enter__(self) -> LiveVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise TangoError("the stream is closed", "open it again")


def _stamped(inner: AnswerStream, moment: LiveMoment, came: float | None) -> Generator[str, None, None]:
    """Pieces of an answer; with the first, its moment gets the lag."""
    with inner:
        while True:
            piece = inner.turn()
            if piece != "" and came is not None:
                moment.lag, came = monotonic() - came, None
            if piece is None:
                return
            yield piece
