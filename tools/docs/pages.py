"""Which parts of which pages are generated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tools.docs import accuracy, bundle_format, c_api, commands, limits, performance, quantization, support
from tools.docs.markdown import filled, part_names

ROOT = Path(__file__).parents[2]

#: What generates each part, by the part's name.
PARTS: dict[str, Callable[[], str]] = {
    "commands.common": commands.common_options,
    "commands": commands.reference,
    "bundle.format": bundle_format.format_version,
    "bundle.schema": bundle_format.schema,
    "c.abi": c_api.abi_version,
    "c.index": c_api.index,
    "c.reference": c_api.reference,
    **{f"limits.{name}": partial(limits.section, name) for name in limits.LIMITS},
    "limits.server": limits.server,
    **{f"support.{name}": part for name, part in support.PARTS.items()},
    **{f"performance.{name}": part for name, part in performance.PARTS.items()},
    **{f"quantization.{name}": part for name, part in quantization.PARTS.items()},
    **{f"accuracy.{name}": part for name, part in accuracy.PARTS.items()},
}


def pages() -> list[Path]:
    """The pages with generated parts."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if part_names(page.read_text(encoding="utf-8"))]


def generated(page: Path) -> str:
    """A page as it should be."""
    return filled(page.read_text(encoding="utf-8"), PARTS)


def stale() -> list[Path]:
    """Pages that are not as they should be."""
    return [page for page in pages() if generated(page) != page.read_text(encoding="utf-8")]
