"""Links to headings lead to headings, as GitHub and MkDocs name them. (That files exist: test_readme.py.)"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("reference", "design", "results", "contributing", "guide/families")


@cache
def headings(page: Path) -> frozenset[str]:
    """Anchors of a page; only those that GitHub and MkDocs make alike."""
    outside = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for title in re.findall(r"^#+ (.*)$", outside, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()).strip()
        if re.sub(r"\s", "-", words) == re.sub(r"[-\s]+", "-", words):
            found.add(re.sub(r"\s", "-", words))
    return frozenset(found)


def pages() -> list[Path]:
    return sorted(page for folder in FOLDERS for page in (ROOT / "docs" / folder).rglob("*.md"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_a_link_to_a_heading_has_one(page: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve() if link else page
        if anchor.startswith("tango_"):  # mkdocstrings makes it: test_reference_pages.py
            continue
        if target.suffix == ".md" and target.is_file():
            assert anchor in headings(target), f"{link}#{anchor}"
