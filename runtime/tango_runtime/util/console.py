"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is imported where something is shown: the chain wants nothing but the type
    from rich.console import Console

OnProgress = Callable[[int], None]


@cache
def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def progress(title: str, total: int, *, size: bool = False) -> Iterator[OnProgress]:
    """Shows how far a piece of work is.

    Args:
        title: What is being done.
        total: Its steps, or bytes.
        size: The steps are bytes.

    Yields:
        A function to call with the number of steps done since the last call.
    """
    if not _console().is_terminal:
        yield from _lines(title, total)
        return
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    count = DownloadColumn() if size else MofNCompleteColumn()
    columns = (TextColumn("{task.description:<10}"), BarColumn(), count, TimeElapsedColumn())
    with Progress(*columns, console=_console()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda steps: bar.advance(task, steps)


def _lines(title: str, total: int) -> Iterator[OnProgress]:
    done, shown = 0, 0

    def on_progress(steps: int) -> None:
        nonlocal done, shown
        done += steps
        percent = 100 * done // max(total, 1)
        if percent >= shown + 25 or (percent == 100 and shown < 100):
            shown = percent
            status(f"{title} {percent}%")

    yield on_progress


def status(line: str) -> None:
    """Writes one line for the user on standard error, where it does not mix with an answer."""
    _console().print(line, markup=False, highlight=False, soft_wrap=True)
