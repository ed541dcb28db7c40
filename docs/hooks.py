"""Links of a page to files of the repository that are not part of the site, such as examples and sources."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from posixpath import normpath
from typing import Any

#: ``[text](target)``, but no image; a target has neither a scheme nor only an anchor.
_LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\((?!\w+:|#)([^)\s]+)\)")

_log = logging.getLogger("mkdocs.hooks.links")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Lets links out of docs/ lead to the repository, or be its path where mkdocs.yml has no ``repo_url``."""
    docs = Path(config.docs_dir)
    folder = Path(page.file.src_uri).parent.as_posix()

    def replaced(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, _, anchor = target.partition("#")
        inside = normpath(f"docs/{folder}/{path}")
        if inside.startswith("docs/"):
            return link.group()
        if not (docs.parent / inside).exists():
            _log.warning("%s: there is no %s in the repository", page.file.src_uri, inside)
        if not config.repo_url:
            return text if text == f"`{inside}`" else f"{text} (`{inside}`)"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{inside}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(replaced, markdown)
