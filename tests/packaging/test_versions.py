"""The oldest and the newest versions of everything that pyproject.toml allows: one small chain in each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.packaging.installs import ROOT, install, interpreter, run

pytestmark = pytest.mark.network  # uv asks a package index


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip of 8 frames and its questions."""
    folder = tmp_path_factory.mktemp("videos") / "made"
    run(sys.executable, ROOT / "examples/make_clip.py", folder, "--frames", 8, cwd=ROOT)
    return folder


def served(tango: Path, bundle: Path, videos: Path, question: str) -> str:
    """What a server answers to a question about the clip."""
    program = [tango, "serve", bundle, "--port", "0", "--media-root", videos]
    content = [
        {"type": "video_url", "video_url": {"url": "file:clip.mp4"}},
        {"type": "text", "text": question},
    ]
    body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 4, "frames": 8})
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, cwd=videos) as process:
        assert process.stderr is not None
        try:
            found = next(filter(None, (re.search(r"serving at (http://\S+)", line) for line in process.stderr)))
            headers = {"Content-Type": "application/json"}
            with urlopen(Request(f"{found[1]}/v1/chat/completions", body.encode(), headers), timeout=600) as response:
                answer: str = json.load(response)["choices"][0]["message"]["content"]
        finally:
            process.terminate()
    return answer


# The oldest versions have no wheels for Python 3.13.
@pytest.mark.parametrize(
    ("version", "resolution"),
    [
        ("3.10", "lowest-direct"),
        ("3.10", "highest"),
        ("3.12", "lowest-direct"),
        ("3.12", "highest"),
        ("3.13", "highest"),
    ],
)
def test_a_chain_with_the_oldest_and_the_newest_versions(
    wheel: Path, videos: Path, tmp_path: Path, version: str, resolution: str
) -> None:
    requirement = f"tango-edge[export,cpu,calibration,server] @ {wheel.as_uri()}"
    options = ("--resolution", resolution, "--only-binary", ":all:")
    tango = install(tmp_path / "venv", requirement, *options, python=interpreter(version)) / "tango"
    tiny, shape = ROOT / "models/tiny", ("--frames", 8, "--max-new-tokens", 4)
    asked = json.loads((videos / "questions.jsonl").read_text().splitlines()[2])

    source = ("--checkpoint", tiny / "llava", "--salience-checkpoint", tiny / "siglip", "--sink-positions")
    run(tango, "export", *source, "--context", 4096, "--frames", 8, "--output", "bundle", "--no-validate", cwd=tmp_path)
    assert "SHA-256 of every file matches" in run(tango, "inspect", "bundle", "--verify", cwd=tmp_path)
    question = ("bundle", videos / "clip.mp4", asked["question"])
    answer = run(tango, "run", *question, *shape, "--report", "kept.html", "--picture", "kept.png", cwd=tmp_path)
    assert answer == asked["answer"] + "\n"
    assert served(tango, tmp_path / "bundle", videos, asked["question"]) == asked["answer"]
    calibration = ("--clips", "synthetic", "--videos", 4, *shape, "--vision", "int8", "--decoder", "int4")
    run(tango, "calibrate", "bundle", *calibration, "--report-dir", "report", "--output", "quantized", cwd=tmp_path)
    assert run(tango, "run", "quantized", *question[1:], *shape, cwd=tmp_path).strip().isalpha()
