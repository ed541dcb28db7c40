"""Messages on standard error: which ones -q, -v and -vv show."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from tango_runtime.util.console import accept_every_character, printable, progress, stages, status, verbosity

LOG = logging.getLogger("tango_runtime.some.module")


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (-1, []),
        (0, ["status", "warning: careful"]),
        (1, ["status", "warning: careful", "info: detail"]),
        (2, ["status", "warning: careful", "info: detail", "debug: more detail"]),
    ],
)
def test_what_each_level_shows(capsys, level, shown):
    with verbosity(level):
        status("status")
        LOG.warning("careful")
        LOG.info("detail")
        LOG.debug("more detail")
    assert capsys.readouterr().err.splitlines() == shown


def test_a_warning_is_shown_once(capsys):
    with verbosity(0):
        for name in ("a", "b", "a"):
            LOG.warning("decoding all of %s", name)
    assert capsys.readouterr().err.splitlines() == ["warning: decoding all of a", "warning: decoding all of b"]


def test_the_level_ends_with_the_block(capsys):
    with verbosity(-1):
        status("hidden")
    with verbosity(0):
        status("shown")
        LOG.info("hidden")
    assert capsys.readouterr().err == "shown\n"
    assert logging.getLogger("tango_runtime").handlers == []


def test_progress_is_a_line_per_quarter_where_there_is_no_terminal(capsys):
    with progress("work", 8) as on_progress:
        for _ in range(8):
            on_progress(1)
    assert capsys.readouterr().err.splitlines() == ["work 25%", "work 50%", "work 75%", "work 100%"]


def test_stages_are_a_line_each_and_per_quarter(capsys):
    with stages("vision") as on_status:
        on_status("reading", None)
        for fraction in (0.1, 0.3, 0.4):
            on_status("building", fraction)
        on_status("writing", None)
    lines = ["vision: reading", "vision: building", "vision: building 25%", "vision: writing"]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"\u0442 \udcff"), ("latin-1", r"\u0442 \udcff"), ("utf-8", "т \\udcff")]
)
def test_every_character_can_be_printed(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    accept_every_character()
    print("т \udcff", end="", flush=True)
    assert stream.buffer.getvalue().decode(encoding) == shown


def test_a_line_that_cannot_be_shown_ends_nothing(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with verbosity(0), progress("work", 2) as on_progress:
        status("status")
        LOG.warning("careful")
        on_progress(2)


@pytest.mark.parametrize(
    ("text", "shown"), [("[/x] ä", "[/x] ä"), ("a\x1b[2J\n", r"a\x1b[2J\n"), ("\ud800", r"\ud800")]
)
def test_a_strangers_text_does_not_steer_the_terminal(text, shown):
    assert printable(text) == shown
