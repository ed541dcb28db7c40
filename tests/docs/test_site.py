"""The site: it builds strictly, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.manuals import ROOT

_INSTALLED = all(map(find_spec, ("material", "mkdocstrings")))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _INSTALLED, reason="MkDocs is not installed: pip install 'tango-edge[docs]'"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return folder


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="?([^"\s>]+)', html)
        loaded += [tag for tag in re.findall(r"<link[^>]*>", html) if 'rel="canonical"' not in tag]
        assert not [tag for tag in loaded if re.search(r"(?:^|[\"=])(?:https?:)?//", tag)], page.name


def test_links_out_of_the_site_are_named(site: Path) -> None:
    assert "<code>examples/08-cpp/README.md</code>" in (site / "guide/cpp.html").read_text(encoding="utf-8")
