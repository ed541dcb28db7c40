"""Several answers at a time: a piece of each in turn, so that they share decode steps where the backend can."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tango_plugins import TangoError
from tango_runtime.pipeline.answer import Answer, AnswerStream


def finished_together(
    begin: Iterable[Callable[[], AnswerStream]], most: int, do: Callable[[Callable[[], Any]], Any]
) -> Iterator[Answer | TangoError]:
    """Finishes answers, and gives them in the order in which they begin.

    Args:
        begin: Each begins an answer.
        most: Answers at a time.
        do: Does a piece of the work, and returns what it returns.

    Yields:
        An answer, or the error that ended it. The others go on.
    """
    waiting = enumerate(begin)
    streams: deque[tuple[int, AnswerStream]] = deque()
    ended: dict[int, Answer | TangoError] = {}
    given = 0
    try:
        while True:
            while len(streams) < most and (first := next(waiting, None)):
                try:
                    streams.append((first[0], do(first[1])))
                except TangoError as error:
                    ended[first[0]] = error
            while given in ended:
                yield ended.pop(given)
                given += 1
            if not streams:
                return
            place, stream = streams.popleft()
            try:
                if do(stream.turn) is None:
                    ended[place] = stream.answer
                else:
                    streams.append((place, stream))
            except TangoError as error:
                ended[place] = error
    finally:
        for _, stream in streams:
            stream.close()
