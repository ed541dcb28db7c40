"""Builds the CUDA library and the TensorRT plugin on the machine that will run them, and tells what is installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tango_plugins import native_library
from tango_plugins.errors import TangoError

TENSORRT_LIBRARY = "libtango_tensorrt.so"


@dataclass(frozen=True)
class Info:
    """What is installed.

    Attributes:
        directory: Where the libraries of these sources belong.
        library: The CUDA library, None where it has not been built.
        version: Its version and the GPU architectures that it was built for, None likewise.
        plugin: The TensorRT plugin, None where it has not been built.
    """

    directory: Path
    library: Path | None
    version: str | None
    plugin: Path | None


def build(
    architectures: Sequence[str] = (),
    tensorrt_include: Path | None = None,
    output: Path | None = None,
    jobs: int = 2,
) -> Info:
    """Builds the libraries with CMake and nvcc and installs them.

    Args:
        architectures: GPU architectures as ``87`` or ``90``; none named builds for the GPU at hand or, without one,
            for every architecture that this nvcc knows.
        tensorrt_include: Folder of NvInfer.h; None looks where JetPack and NVIDIA's packages put it, and builds the
            CUDA library alone if it is not there.
        output: Where to install; None takes the place where ``tango_plugins.native_library`` looks.
        jobs: Compilations at a time; each takes up to 1 GB of memory.

    Raises:
        TangoError: CMake or nvcc is missing or fails, or a named header folder has no NvInfer.h.
    """
    output = output if output is not None else native_library.install_directory()
    cmake = _tool("cmake", "install it: pip install cmake, or apt install cmake")
    _tool("nvcc", "install the CUDA toolkit and put its bin folder on the PATH (/usr/local/cuda/bin)")
    options = []
    if architectures:
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}")
    if tensorrt_include is not None:
        if not (tensorrt_include / "NvInfer.h").is_file():
            raise TangoError(f"{tensorrt_include} has no NvInfer.h", "name the folder of TensorRT's headers")
        options.append(f"-DTENSORRT_INCLUDE_DIR={tensorrt_include.resolve()}")
    with tempfile.TemporaryDirectory() as folder:
        _run(cmake, "-S", str(native_library.NATIVE), "-B", folder, *options)
        _run(cmake, "--build", folder, "--parallel", str(jobs))
        output.mkdir(parents=True, exist_ok=True)
        _run(cmake, "--install", folder, "--prefix", str(output.resolve()))
    return info(output)


def info(directory: Path | None = None) -> Info:
    """What is installed in a folder; None takes the place where ``tango_plugins.native_library`` looks.

    Raises:
        TangoError: The CUDA library is there and cannot be loaded.
    """
    directory = directory if directory is not None else native_library.install_directory()
    core, plugin = directory / native_library.LIBRARY, directory / TENSORRT_LIBRARY
    return Info(
        directory=directory,
        library=core if core.is_file() else None,
        version=native_library.load(core).tango_version().decode() if core.is_file() else None,
        plugin=plugin if plugin.is_file() else None,
    )


def _tool(name: str, hint: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise TangoError(f"{name} is not on the PATH", hint)
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        last = "\n".join(done.stdout.strip().splitlines()[-20:])
        raise TangoError(f"`{' '.join(command)}` failed:\n{last}", "mend what its last lines name, then build again")
