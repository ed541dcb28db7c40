"""Messages for the user on standard error, where they do not mix with an answer: status lines, progress, the log."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is imported where something is shown: the pipeline only needs the type
    from rich.console import Console

#: Called with the number of steps done since the last call.
OnProgress = Callable[[int], None]
#: Called with the current stage, and its progress from 0 to 1 or None if that is unknown.
OnStatus = Callable[[str, "float | None"], None]

#: Packages whose loggers the console shows; each module logs as ``logging.getLogger(__name__)``.
_PACKAGES = ("tango_runtime", "tango_plugins", "tango_export", "tango_calibration")


@cache
def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def accept_every_character() -> None:
    """Makes standard output and error write a character that their encoding does not have as an escape.

    A name or an answer may hold any character, and an error while it is printed would end hours of work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """A stranger's text with escapes for what is not printable, so that it cannot steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def status(line: str) -> None:
    """Shows one line, unless :func:`verbosity` is -1. What cannot be shown, as on a full disk, ends no work."""
    with suppress(OSError):
        _console().print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def verbosity(level: int) -> Iterator[None]:
    """Shows the log while the block runs.

    Args:
        level: -1 shows nothing, 0 status lines, progress and warnings, 1 informational and 2 debug messages too.
    """
    handler = _ConsoleHandler()
    loggers = [logging.getLogger(package) for package in _PACKAGES]
    levels = [logger.level for logger in loggers]
    _console().quiet = level < 0
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[max(0, min(level, 2))])
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(before)
        _console().quiet = False


class _ConsoleHandler(logging.Handler):
    """Shows log records as ``warning: …`` lines, every warning once."""

    def __init__(self) -> None:
        super().__init__()
        self._warnings: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one record."""
        line = f"{record.levelname.lower()}: {self.format(record)}"
        if record.levelno >= logging.WARNING:
            if line in self._warnings:
                return
            self._warnings.add(line)
        status(line)


@contextmanager
def progress(
    title: str, total: int, *, size: bool = False, note: Callable[[], str] | None = None
) -> Iterator[OnProgress]:
    """Shows the progress of a task: a bar on a terminal, a line per quarter elsewhere.

    Args:
        title: What is being done.
        total: Number of its steps, or of bytes.
        size: Whether the steps are bytes.
        note: Returns a few words to show after the progress.

    Yields:
        A function to call with the number of steps done since the last call.
    """
    if not _console().is_terminal:
        yield _step_lines(title, total, note)
        return
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    count = DownloadColumn() if size else MofNCompleteColumn()
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        count,
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_console()) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda steps: bar.update(task, advance=steps, note=note() if note else "")


@contextmanager
def stages(title: str) -> Iterator[OnStatus]:
    """Shows the stages of a task: a bar on a terminal, a line per stage and quarter elsewhere.

    Yields:
        A function to call with the current stage and its progress.
    """
    if not _console().is_terminal:
        yield _stage_lines(title)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[stage]}"), TimeElapsedColumn())
    with Progress(*columns, console=_console(), transient=True) as bar:
        task = bar.add_task(f"{title:<8}", total=None, stage="")

        def on_status(stage: str, fraction: float | None) -> None:
            bar.update(task, total=None if fraction is None else 1.0, completed=fraction or 0.0, stage=stage)

        yield on_status


def _step_lines(title: str, total: int, note: Callable[[], str] | None) -> OnProgress:
    done, shown = 0, 0

    def on_progress(steps: int) -> None:
        nonlocal done, shown
        done += steps
        percent = 100 * done // max(total, 1)
        if percent >= shown + 25 or (percent == 100 and shown < 100):
            shown = percent
            status(f"{title} {percent}%" + (f", {note()}" if note else ""))

    return on_progress


def _stage_lines(title: str) -> OnStatus:
    shown: tuple[str, int] = ("", 0)

    def on_status(stage: str, fraction: float | None) -> None:
        nonlocal shown
        percent = 25 * int(4 * (fraction or 0.0))
        if stage != shown[0] or percent > shown[1]:
            shown = (stage, percent)
            status(f"{title}: {stage}" + (f" {percent}%" if percent else ""))

    return on_status
