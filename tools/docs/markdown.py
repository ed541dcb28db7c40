"""Markdown: tables, and the generated parts of a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

_BEGIN, _END = r"(?P<begin><!-- generated: (?P<name>[\w.-]+) -->\n)", r"(?P<end><!-- end of generated -->\n)"
_PART = re.compile(f"{_BEGIN}.*?{_END}", re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, one line per row; empty without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    assert all(len(line) == len(head) for line in lines), f"rows of {head} have different lengths"
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def code(text: str) -> str:
    """Text in the font of code."""
    return f"`{text}`"


def prose(docstring: str) -> str:
    """A docstring as Markdown: code and references in single backticks, each paragraph on one line."""
    text = re.sub(r":(?:meth|func|class|attr|data):`[~.]?([^`]+)`", r"`\1`", docstring).replace("``", "`")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip()))


def filled(page: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """The page with all of its parts generated again.

    A part is what lies between ``<!-- generated: NAME -->`` and ``<!-- end of generated -->``.

    Raises:
        KeyError: The page has a part that nothing generates.
    """
    return _PART.sub(lambda found: f"{found['begin']}\n{parts[found['name']]().strip()}\n\n{found['end']}", page)


def part_names(page: str) -> list[str]:
    """Names of a page's generated parts."""
    return [found["name"] for found in _PART.finditer(page)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
