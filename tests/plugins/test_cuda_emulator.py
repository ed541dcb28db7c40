"""Kernels on a CPU, a thread for each of the GPU's: what they compute, and that they wait for all they read. Copies
arrive as late as they may, and shared memory is NaN until then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tango_plugins.decoder import DecoderShape
from tests.plugins.attentions import Pass, Shape, check
from tests.plugins.cuda_emulator import compiled
from tests.plugins.decoders import EPS, Decoder, check_step

ROOT = Path(__file__).parents[2]
SHAPES = {
    "tests": DecoderShape(2, 64, 4, 2, 16, 128, 420, 448, 512, EPS),
    "odd": DecoderShape(2, 144, 3, 1, 48, 208, 300, 304, 700, EPS),
    "blocks with nothing to do": DecoderShape(3, 16, 1, 1, 16, 256, 250, 256, 80, EPS),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """``library("decode")``."""
    return cache(lambda name: compiled(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize(
    ("name", "blocks", "positions"),
    [
        ("tests", 1, (0, 65, 511)),
        ("tests", 3, (150,)),
        ("odd", 2, (0, 699)),
        ("blocks with nothing to do", 3, (0, 70)),
    ],
)
def test_logits_and_new_rows_are_those_of_fp64(library, name, blocks, positions):
    decoder = Decoder(SHAPES[name], library=library("decode"), blocks=blocks, device="cpu")
    for position in positions:
        check_step(decoder, position)


@pytest.mark.parametrize(
    ("shape", "begin"),
    [
        (Shape(9, 4, 2, 16, 80), 0),
        (Shape(3, 3, 1, 48, 200), 130),
        (Shape(70, 2, 1, 64, 100), 0),
        (Shape(20, 7, 1, 128, 90), 60),
        (Shape(5, 2, 2, 80, 64), 0),
        (Shape(12, 3, 1, 192, 60), 40),
        (Shape(70, 4, 2, 48, 170), 90),  # large tiles
        (Shape(70, 4, 2, 96, 170), 90),
    ],
)
def test_attention_is_that_of_fp64(library, shape, begin):
    check(Pass(shape, begin, path=library("attention"), device="cpu"))


@pytest.fixture
def sanitizer():
    """The environment in which ThreadSanitizer watches a process from its start."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH")
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {"LD_PRELOAD": found.stdout.strip(), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", ""], env=environment, capture_output=True, text=True)
    if ran.returncode != 0 or ran.stderr:
        pytest.skip(f"ThreadSanitizer does not run here: {ran.stderr.strip()}")
    return environment


@pytest.mark.parametrize("name", ["decode", "attention"])
def test_no_two_threads_race(tmp_path, sanitizer, name):
    library = compiled(tmp_path, name, flags=("-fsanitize=thread", "-g", "-DTANGO_EARLY_COPIES"))
    command = [sys.executable, "-m", "tests.plugins.cuda_emulator.races", name, str(library)]
    ran = subprocess.run(command, env=sanitizer, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
