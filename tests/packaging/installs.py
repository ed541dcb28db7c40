"""Installing tango-edge beside the environment of the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")


def run(*command: object, cwd: Path | None = None) -> str:
    """Standard output of a command that succeeds."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def install(folder: Path, requirement: str, *options: object, python: str = sys.executable) -> Path:
    """Makes a virtual environment with a requirement; returns the folder of its programs."""
    run(UV, "venv", "--quiet", "--no-python-downloads", "--python", python, folder)
    run(UV, "pip", "install", "--quiet", "--python", folder / "bin" / "python", *options, requirement)
    return folder / "bin"


def interpreter(version: str) -> str:
    """A Python of a version such as 3.10, from the PATH or pyenv; the test is skipped where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *(str(path) for path in pyenv.glob(f"{version}.*/bin/python"))]
    asked = "import sys; print('{}.{}'.format(*sys.version_info))"
    for path in filter(None, found):  # a shim of pyenv may be there for a version that is not chosen
        done = subprocess.run([path, "-c", asked], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return path
    return pytest.skip(f"there is no Python {version} here")
