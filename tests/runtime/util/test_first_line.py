"""One line about another library's exception."""

from __future__ import annotations

import pytest

from tango_runtime.util.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError("\n  first\nsecond"), "first"),
        (ValueError(""), "ValueError"),
        (KeyError(), "KeyError"),
        (MemoryError("\n"), "MemoryError"),
    ],
)
def test_first_line(error, line):
    assert first_line(error) == line
