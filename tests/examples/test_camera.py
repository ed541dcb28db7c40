"""examples/camera.py answers about a file that stands in for the camera."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from examples.make_video import write

CAMERA = Path(__file__).parents[2] / "examples" / "camera.py"


def test_it_answers_about_what_it_saw_last(bundle: Callable[..., Path], tmp_path: Path) -> None:
    write(tmp_path / "clip.mp4")
    arguments = [
        str(bundle()),
        "What moves?",
        "--source",
        str(tmp_path / "clip.mp4"),
        "--frames",
        "4",
        "--answers",
        "1",
    ]
    done = subprocess.run([sys.executable, str(CAMERA), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
