"""Builds the CUDA library and the TensorRT plugin on the machine that will run them, and reports what is installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tango_plugins import native_library
from tango_plugins.errors import TangoError
from tango_plugins.version import package_version

TENSORRT_LIBRARY = "libtango_tensorrt.so"


@dataclass(frozen=True)
class Info:
    """What is installed.

    Attributes:
        directory: The folder that was searched.
        library: The CUDA library, or None.
        version: The library's version, its CUDA and the GPU architectures that it was built for, or None.
        plugin: The TensorRT plugin, or None.
        origin: Where the library in use comes from, such as ``prebuilt``; None if a folder was given.
        code: The code in it that this GPU runs, such as ``sm_87``; None without a GPU, or if a folder was given.
        passed_over: A sentence for each unusable library that the search found earlier.
    """

    directory: Path
    library: Path | None
    version: str | None
    plugin: Path | None
    origin: str | None = None
    code: str | None = None
    passed_over: tuple[str, ...] = ()


def build(
    architectures: Sequence[str] = (),
    tensorrt_include: Path | None = None,
    output: Path | None = None,
    jobs: int = 2,
) -> Info:
    """Builds the libraries with CMake and nvcc and installs them.

    Args:
        architectures: GPU architectures such as ``87`` or ``90``. The default is this machine's GPU, or without a GPU
            every architecture that nvcc knows.
        tensorrt_include: Folder of NvInfer.h. None searches where JetPack and NVIDIA's packages install it; if it is
            not there, only the CUDA library is built.
        output: Where to install; None takes ``tango_plugins.native_library.install_directory``, which is searched
            before a prebuilt library.
        jobs: Parallel compilations; each takes up to 1 GB of memory.

    Raises:
        TangoError: CMake or nvcc is missing or fails, or ``tensorrt_include`` has no NvInfer.h.
    """
    output = output if output is not None else native_library.install_directory()
    cmake = _tool("cmake", "install it: pip install cmake, or apt install cmake")
    _tool("nvcc", "install the CUDA toolkit and put its bin folder on the PATH (/usr/local/cuda/bin)")
    options = [f"-DTANGO_VERSION={package_version()}"]
    if architectures:
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}")
    if tensorrt_include is not None:
        if not (tensorrt_include / "NvInfer.h").is_file():
            raise TangoError(f"{tensorrt_include} has no NvInfer.h", "pass the folder of TensorRT's headers")
        options.append(f"-DTENSORRT_INCLUDE_DIR={tensorrt_include.resolve()}")
    with tempfile.TemporaryDirectory() as folder:
        _run(cmake, "-S", str(native_library.NATIVE), "-B", folder, *options)
        _run(cmake, "--build", folder, "--parallel", str(jobs))
        output.mkdir(parents=True, exist_ok=True)
        _run(cmake, "--install", folder, "--prefix", str(output.resolve()))
    return info(output)


def info(directory: Path | None = None) -> Info:
    """What is installed in a folder; None takes the library in use (``tango_plugins.native_library.search``).

    Raises:
        TangoError: The folder has a CUDA library that cannot be loaded.
    """
    if directory is not None:
        return _info(directory / native_library.LIBRARY)
    found = native_library.search()
    passed_over = tuple(f"{place.origin}: {place.error.message}" for place in found if place.error is not None)
    if found[-1].error is not None:
        return Info(found[0].path.parent, None, None, None, passed_over=passed_over)
    return replace(_info(found[-1].path), origin=found[-1].origin, code=found[-1].code, passed_over=passed_over)


def _info(library: Path) -> Info:
    plugin = library.parent / TENSORRT_LIBRARY
    return Info(
        directory=library.parent,
        library=library if library.is_file() else None,
        version=native_library.load(library).tango_version().decode() if library.is_file() else None,
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
        raise TangoError(f"`{' '.join(command)}` failed:\n{last}", "fix the error above, then build again")
