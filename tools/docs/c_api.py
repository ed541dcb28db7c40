"""The C interface, from its headers."""

from __future__ import annotations

import re
from pathlib import Path

from tools.docs.markdown import code, table

INCLUDE = Path(__file__).parents[2] / "plugins/tango_plugins/native/include"

#: The order of the page: what all headers share, the operator, then what a model's graphs call.
HEADERS = (
    "common.h",
    "prune.h",
    "thin.h",
    "frames.h",
    "patches.h",
    "rows.h",
    "linear.h",
    "fp8.h",
    "decode.h",
    "attention.h",
    "vision_attention.h",
    "patch_rotation.h",
    "norm.h",
    "activation.h",
    "argmax.h",
    "steps.h",
)

_FUNCTION = re.compile(r"^TANGO_API [^;]*?\b(tango_\w+)\(", re.MULTILINE)
_SIZE = re.compile(r"^#define (TANGO_[A-Z_]+) +(\d+)", re.MULTILINE)


def functions() -> dict[str, list[str]]:
    """The public functions of each header."""
    return {header: _FUNCTION.findall(_text(header)) for header in HEADERS}


def constant(header: str, name: str) -> int:
    """A number that a header defines."""
    return int(dict(_SIZE.findall(_text(header)))[name])


def abi_version() -> str:
    """The version of the binary interface."""
    return f"`TANGO_ABI_VERSION` is {constant('common.h', 'TANGO_ABI_VERSION')}."


def index() -> str:
    """A table of the headers and their functions."""
    rows = [(f"[tango/{h}](#{_anchor(h)})", ", ".join(map(code, found))) for h, found in functions().items()]
    return table(("header", "functions"), rows)


def reference() -> str:
    """A section for each header: what it is about, and its declarations as they are."""
    return "\n".join(_section(header) for header in HEADERS)


def _section(header: str) -> str:
    text = _text(header)
    about, _, rest = text.partition("*/")
    inside = rest.partition('extern "C" {\n#endif\n')[2].rpartition("#ifdef __cplusplus\n}")[0]
    title = f"### tango/{header}\n"
    return f"{title}\n{_comment(about)}\n\n```c\n{inside.strip()}\n```\n"


def _comment(text: str) -> str:
    lines = [re.sub(r"^ ?\*? ?", "", line) for line in text.removeprefix("/*").splitlines()]
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _anchor(header: str) -> str:
    return f"tango{header.replace('.', '')}"


def _text(header: str) -> str:
    return (INCLUDE / "tango" / header).read_text(encoding="utf-8")
