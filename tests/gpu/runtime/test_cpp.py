"""examples/08-cpp says what the Python chain says: the same engines, and no Python.

Needs CMake, the TensorRT plugins (`tango plugin build`), and NvInfer.h in a usual place or named:

    python -m pytest tests/gpu/runtime/test_cpp.py --tensorrt-include FOLDER
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.make_video import write
from tango_runtime.system import gpu as system
from tests.gpu.runtime.conftest import build

EXAMPLE = Path(__file__).parents[3] / "examples" / "08-cpp"
QUESTION = "What happens in the video?"


@pytest.fixture(scope="module")
def program(request, tmp_path_factory):
    """tango_clip, built with the TensorRT that Python has loaded."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on the PATH")
    plugin = system.plugin()
    if plugin is None:
        pytest.skip("the TensorRT plugins are not built (tango plugin build --tensorrt-include FOLDER)")
    folder = tmp_path_factory.mktemp("cpp")
    include = request.config.getoption("--tensorrt-include")
    options = [f"-DTANGO_DIR={plugin.path.parent}", f"-DTENSORRT_LIBRARY={loaded('libnvinfer.so')}"]
    options += [f"-DTENSORRT_INCLUDE_DIR={include.resolve()}"] if include else []
    done = run("cmake", "-S", EXAMPLE, "-B", folder, *options)
    if "no NvInfer.h" in done.stderr:
        pytest.skip("there is no NvInfer.h (--tensorrt-include FOLDER)")
    assert done.returncode == 0, done.stderr
    done = run("cmake", "--build", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "tango_clip"


@pytest.fixture
def clip(tmp_path):
    """``clip(bundle, frames=…, tokens=…)``: its clip.txt, and the video it is of."""
    video = tmp_path / "video.mp4"
    write(video)

    def prepared(bundle, *, frames=8, tokens=40):
        options = ["--frames", frames, "--max-new-tokens", tokens]
        done = run(sys.executable, EXAMPLE / "prepare.py", bundle, video, QUESTION, tmp_path / "clip", *options)
        assert done.returncode == 0, done.stderr
        return tmp_path / "clip" / "clip.txt", video

    return prepared


@pytest.fixture(scope="module")
def complete(built):
    """``complete("fp32", "portable")``: a bundle with all four engines."""

    def made(dtype, form="portable"):
        build(built(dtype, form), "--graphs", "prune")
        return built(dtype, form)

    return made


@pytest.mark.parametrize(("dtype", "form"), [("fp32", "portable"), ("fp16", "portable"), ("fp16", "device")])
def test_it_says_what_python_says(program, clip, complete, monkeypatch, dtype, form):
    from tango_runtime import VideoLLM

    bundle = complete(dtype, form)
    llm = VideoLLM(bundle, "tensorrt")
    backend = llm._backend
    assert backend._graphs.in_place == (form == "device")
    if form == "device":  # C++ has no one-kernel step, which rounds otherwise than a pass of the engine
        passed = lambda cache, token: backend.extend(cache, [backend.embed(np.array([token]))])  # noqa: E731
        monkeypatch.setattr(backend, "decode", passed)
    for frames, tokens in ((8, 40), (32, 8), (1, 1)):
        path, video = clip(bundle, frames=frames, tokens=tokens)
        done = run(program, path)
        assert done.returncode == 0, done.stderr
        answer = llm.generate(video, QUESTION, frames=frames, max_new_tokens=tokens, temperature=0)
        assert [int(token) for token in done.stdout.split()] == list(answer.ids)
        assert f"{answer.kept} of {answer.total} tokens kept" in done.stderr


FORMS = pytest.mark.parametrize(("dtype", "form"), [("fp32", "portable"), ("fp16", "device")])


@FORMS
def test_it_stops_where_the_model_does(program, clip, complete, dtype, form):
    path, _ = clip(complete(dtype, form))
    said = run(program, path).stdout.split()
    text = path.read_text()
    path.write_text(text.replace("\nstop ", f"\nstop {said[10]} "))
    assert run(program, path).stdout.split() == said[: said.index(said[10])]


@FORMS
@pytest.mark.parametrize(
    ("line", "instead", "error", "hint"),
    [
        ("tokens 40", "tokens 4000", "positions, the decoder holds", "--max-new-tokens"),
        ("tokens 40", "tokens 0", "tokens of the clip: 0", "--max-new-tokens"),
        ("stop ", "halt ", "the clip has no stop", "prepare.py"),
        ("seconds ", "seconds 0 ", "frames.raw does not have", "prepare.py"),
        ("/decoder-", "/other-", "cannot be read", "prepare.py"),
    ],
)
def test_what_it_cannot_do_it_refuses(program, clip, complete, dtype, form, line, instead, error, hint):
    path, _ = clip(complete(dtype, form))
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, instead))
    done = run(program, path)
    assert done.returncode == 2
    assert error in done.stderr
    assert hint in done.stderr.split("hint: ")[1]


@FORMS
def test_more_frames_than_the_engines_take_are_refused(program, clip, complete, dtype, form):
    path, _ = clip(complete(dtype, form), frames=33)
    done = run(program, path)
    assert done.returncode == 2
    assert "was built for other shapes of frames" in done.stderr
    assert "--max-frames" in done.stderr


@pytest.mark.parametrize(
    ("spoil", "error", "hint"),
    [
        (lambda lines: ["/no/such/file", *lines[1:]], "/no/such/file cannot be read", "prepare.py"),
        (lambda lines: [lines[0], f"{1 << 50} {lines[1].split()[1]}", *lines[2:]], "does not hold", "prepare.py"),
        (lambda lines: [*lines[:2], "a line without an offset", *lines[2:]], "is not a list of weights", "prepare.py"),
        (lambda lines: [lines[0], "0 no.such.weight", *lines[1:]], "has no tensor no.such.weight", "tango build"),
        (lambda lines: lines[:-1], "cannot run", "TensorRT's message"),
    ],
    ids=["no file", "beyond its end", "no list", "one too many", "one too few"],
)
def test_weights_that_are_not_the_engines_are_refused(program, clip, complete, spoil, error, hint):
    path, _ = clip(complete("fp16", "device"))
    (listed,) = (line.split(" ", 1)[1] for line in path.read_text().splitlines() if line.startswith("decoder_weights "))
    weights = Path(listed)
    weights.write_text("".join(f"{line}\n" for line in spoil(weights.read_text().splitlines())))
    done = run(program, path)
    assert done.returncode == 2
    assert error in done.stderr
    assert hint in done.stderr.split("hint: ")[1]


def run(*command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def loaded(name):
    """Path of a library that this process has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in lines if f"/{name}" in line)
