"""These tests need an NVIDIA GPU, cuda-bindings and the CUDA library; they say which is missing.

They run on a bundle made here, where torch and transformers are, or on bundles that were made elsewhere:

    python -m pytest tests/gpu/runtime --bundles FOLDER

FOLDER holds a bundle ``fp32`` and one ``fp16``, made by ``python -m tests.gpu.runtime.bundles FOLDER``. Engines are
built into a copy of them, which ``--engines FOLDER`` keeps for the next run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tango_plugins import TangoError

#: What the engines are built for: the tests' largest video, nothing pruned, and 64 tokens of an answer.
FRAMES, TOKENS, CONTEXT = 32, 640, 1024


def pytest_addoption(parser):
    parser.addoption("--bundles", type=Path, help="folder of the bundles fp32 and fp16 for the tests on the GPU")
    parser.addoption("--engines", type=Path, help="folder that keeps their copies with engines from run to run")


@pytest.fixture(autouse=True, scope="session")
def gpu():
    from tango_runtime.backends.cuda.backend import open_stream

    try:
        open_stream()
    except TangoError as error:
        pytest.skip(f"{error.message} ({error.hint})")


@pytest.fixture(scope="session")
def folder(request, tmp_path_factory):
    """``folder("fp32")``: a bundle of 4 frames of 16 tokens each, a copy that may be written into."""
    given = request.config.getoption("--bundles")

    @cache
    def copied(dtype):
        if given is None:
            pytest.importorskip("transformers", reason="neither transformers to make a bundle nor --bundles is there")
            source = request.getfixturevalue("responsive_checkpoint")(dtype=dtype)[1]
        else:
            source = given / dtype
        return shutil.copytree(source, tmp_path_factory.mktemp("bundles") / dtype)

    return copied


@pytest.fixture(scope="session")
def kept(request, tmp_path_factory):
    """``kept(bundle, "fp16-device")``: a copy of a bundle that engines are built into; it may have them already."""
    given = request.config.getoption("--engines")

    def copied(bundle, name):
        copy = (given or tmp_path_factory.mktemp("built")) / name
        return copy if copy.exists() else shutil.copytree(bundle, copy)

    return copied


@pytest.fixture(scope="session")
def built(folder, kept):
    """``built("fp32", "portable")``: the same bundle with engines of one form of its graphs."""

    @cache
    def made(dtype, form="portable"):
        pytest.importorskip("tensorrt", reason="TensorRT is not installed")
        if form == "device" and dtype == "fp32":
            pytest.skip("a bundle in fp32 has no device graphs")
        bundle = kept(folder(dtype), f"{dtype}-{form}")
        build(bundle, "--form", form)
        return bundle

    return made


@pytest.fixture(scope="session", params=["tensorrt portable", "tensorrt device", "ort-cuda"])
def load(request, folder, built):
    """``load("fp32")``: the pipeline on each GPU backend."""
    backend, _, form = request.param.partition(" ")

    @cache
    def loaded(dtype):
        from tango_runtime import VideoLLM

        bundle = built(dtype, form) if backend == "tensorrt" else folder(dtype)
        try:
            return VideoLLM(bundle, backend)
        except TangoError as error:
            missing = "is not installed", "is the one without CUDA", "cannot be imported"
            if any(words in error.message for words in missing):
                pytest.skip(error.message)
            raise

    return loaded


@pytest.fixture(scope="session")
def on_cpu(folder):
    """``on_cpu("fp32")``: the pipeline that the others are compared with."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime, which gives the answers to compare with, is not installed")

    @cache
    def loaded(dtype):
        from tango_runtime import VideoLLM

        return VideoLLM(folder(dtype), "ort-cpu")

    return loaded


def build(folder, *options, check=True):
    """Runs `tango build` for the graphs that the stages load; gives the finished process.

    Skips the test where the plugins that an engine needs are not built.
    """
    command = [
        sys.executable,
        "-m",
        "tango_runtime.cli.main",
        "build",
        str(folder),
        "--graphs",
        "vision",
        "embed",
        "decoder",
    ]
    sizes = ["--max-frames", str(FRAMES), "--max-tokens", str(TOKENS), "--context", str(CONTEXT)]
    level = ["--builder-optimization-level", "1"]
    done = subprocess.run([*command, *sizes, *level, *options], capture_output=True, text=True)
    if "are not built for TensorRT" in done.stderr:
        pytest.skip(done.stderr)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def video():
    """``video(seed, frames)``: uint8 [frames, 36, 64, 3], noise in which a block wanders and some scenes change."""

    def made(seed, count):
        rng = np.random.default_rng(seed)
        scenes = rng.integers(0, 120, (1 + count // 8, 36, 64, 3), dtype=np.uint8)
        clip = scenes[np.sort(rng.integers(0, len(scenes), count))]
        for i, frame in enumerate(clip):
            left = int(rng.integers(0, 50)) if rng.random() < 0.2 else i % 50
            frame[10:20, left : left + 12] = rng.integers(0, 255, 3, dtype=np.uint8)
        return clip

    return made
