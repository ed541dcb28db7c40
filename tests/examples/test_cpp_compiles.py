"""examples/08-cpp with headers of TensorRT (``--tensorrt-include FOLDER``); tests/gpu/runtime/test_cpp.py runs it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tango_plugins.native_library import NATIVE

PROGRAM = Path(__file__).parents[2] / "examples" / "08-cpp" / "main.cpp"


@pytest.mark.nvcc
def test_the_program_compiles_without_a_warning(tensorrt_headers, tmp_path):
    command = ["nvcc", "-x", "c++", "-std=c++17", "-c", PROGRAM, "-o", tmp_path / "main.o", f"-I{NATIVE / 'include'}"]
    command += ["-isystem", tensorrt_headers, "-Xcompiler", "-Wall,-Wextra,-Werror"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
