"""Tables on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def print_lines(lines: Iterable[str]) -> None:
    """Prints lines; characters that the terminal's encoding does not have become escapes.

    Types of questions and names of layers may contain any character, and an error here would end hours of work.
    """
    encoding = sys.stdout.encoding or "utf-8"
    print("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding))
