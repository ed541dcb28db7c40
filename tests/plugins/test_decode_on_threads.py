"""The kernel of a decode step on a CPU, a thread for each of the GPU's: what it computes, and that it waits for all it
reads. Copies arrive as late as they may, and shared memory is NaN until then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tango_plugins.decoder import DecoderShape
from tango_plugins.library import NATIVE
from tests.plugins.decoders import EPS, Decoder, check_step

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "on_threads"
SHAPES = {
    "tests": DecoderShape(2, 64, 4, 2, 16, 128, 420, 448, 512, EPS),
    "odd": DecoderShape(2, 144, 3, 1, 48, 208, 300, 304, 700, EPS),
    "blocks with nothing to do": DecoderShape(3, 16, 1, 1, 16, 256, 250, 256, 80, EPS),
}


def compiled(folder, *flags):
    """The decode step as it is, but for machine.cuh."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    shutil.copytree(NATIVE / "src" / "decode", folder, ignore=lambda *_: ["machine.cuh"], dirs_exist_ok=True)
    # Attributes and pragmas that only a GPU's compiler knows are passed over.
    host = ",".join(("-fPIC", "-pthread", "-Wall", "-Werror", "-Wno-attributes", "-Wno-unknown-pragmas", *flags))
    command = ["nvcc", "-x", "c++", "-std=c++20", "-O1", "-shared", "-cudart", "none", "-Xcompiler", host]
    include = [f"-I{path}" for path in (HERE, folder, NATIVE / "src", NATIVE / "include")]
    subprocess.run([*command, *include, str(HERE / "library.cpp"), "-o", str(folder / "library.so")], check=True)
    return folder / "library.so"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("on_threads"))


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
    decoder = Decoder(SHAPES[name], library=library, blocks=blocks, device="cpu")
    for position in positions:
        check_step(decoder, position)


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


def test_no_two_threads_race(tmp_path, sanitizer):
    library = compiled(tmp_path, "-fsanitize=thread", "-g")
    command = [sys.executable, "-m", "tests.plugins.on_threads.races", str(library)]
    ran = subprocess.run(command, env=sanitizer, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
