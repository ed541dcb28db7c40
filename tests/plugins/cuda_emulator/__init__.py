"""The CUDA library's kernels, compiled for a CPU: a thread for each of the GPU's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tango_plugins.native_library import NATIVE

HERE = Path(__file__).parent

#: What each library has of the CUDA library's sources; what these include lies here, or where it lies there.
SOURCES = {
    "decode": ["decode/decode.cu", "decode/step.cuh", "decode/product.cuh", "decode/attend.cuh"],
    "attention": ["attention.cu"],
    "activate": ["activate.cu"],
    "operators": [],
}


def compiled(folder, *names, flags=()):
    """A library of kernels as they are, but for what is below C++.

    Args:
        folder: Where it is built.
        names: Of ``SOURCES``, ``decode`` or ``attention`` first.
        flags: More flags of the compiler.
    """
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    for name in names:
        for source in SOURCES[name]:
            shutil.copy(NATIVE / "src" / source, folder)
    # Attributes and pragmas that only a GPU's compiler knows are passed over.
    host = ",".join(("-fPIC", "-pthread", "-Wall", "-Werror", "-Wno-attributes", "-Wno-unknown-pragmas", *flags))
    command = ["nvcc", "-x", "c++", "-std=c++20", "-O1", "-shared", "-cudart", "none", "-Xcompiler", host]
    include = [f"-I{path}" for path in (HERE, folder, NATIVE / "src", NATIVE / "include")]
    sources = [str(HERE / f"{name}.cpp") for name in names]
    subprocess.run([*command, *include, *sources, "-o", str(folder / "library.so")], check=True)
    return folder / "library.so"
