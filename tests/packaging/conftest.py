"""The wheel of this checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.packaging.installs import ROOT, run


@pytest.fixture(scope="session")
def wheel_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: building in place would leave build/ and egg-info behind."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="session")
def wheel(wheel_source: Path) -> Path:
    out = wheel_source.parent
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, wheel_source)
    return next(out.glob("*.whl"))
