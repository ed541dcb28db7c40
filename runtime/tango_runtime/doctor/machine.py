"""Checks of this machine: its CPU, GPU and driver; what is installed there is in packages.py."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tango_runtime
from tango_plugins import TangoError
from tango_plugins.version import package_version
from tango_runtime.backends.ort_options import int8_saturates
from tango_runtime.doctor import packages
from tango_runtime.doctor.check import GPU_BACKENDS, Check
from tango_runtime.doctor.jetson import check_jetson
from tango_runtime.system import gpu as system
from tango_runtime.util.units import gigabytes


@dataclass(frozen=True)
class Machine:
    """This machine, and what was checked of it.

    Attributes:
        gpu: The first GPU, None if there is none.
        tensorrt: Version of TensorRT in this Python, None if it cannot be imported.
        checks: In the order of the stack, the GPU first.
    """

    gpu: system.Gpu | None
    tensorrt: str | None
    checks: tuple[Check, ...]


def check_machine() -> Machine:
    """Checks this machine."""
    gpu, gpu_checks = _gpu()
    tensorrt = packages.tensorrt_version()
    checks = (
        Check("tango-edge", "ok", f"{package_version()}, {Path(tango_runtime.__file__).parent}"),
        Check("system", "ok", platform.platform()),
        Check("Python", "ok", f"{sys.version.split()[0]}, {sys.executable}"),
        _cpu(),
        *gpu_checks,
        *check_jetson(),
        *_memory(gpu),
        *packages.check_packages(gpu),
    )
    return Machine(gpu, tensorrt, checks)


def _cpu(file: Path = Path("/proc/cpuinfo")) -> Check:
    """The CPU, and whether INT8 products need ONNX Runtime's exact kernels on it."""
    lines = file.read_text().split("\n") if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    text = next(names, "") or platform.machine()
    if packages.try_import("onnxruntime")[0] is not None and int8_saturates():
        text += ", no VNNI: INT8 bundles run on exact kernels, slower than with VNNI"
    return Check("CPU", "ok", text)


# The GPU and its driver.


def _gpu() -> tuple[system.Gpu | None, list[Check]]:
    """The first GPU, None if there is none, and the checks of it."""
    try:
        gpu = system.gpu()
    except TangoError as error:
        return None, [Check("GPU", "missing", error.message, error.hint, GPU_BACKENDS)]
    text = f"{gpu.name}, compute capability {gpu.compute_capability}, {gigabytes(gpu.memory)}"
    driver = f"{_driver_version() or 'unknown version'}, supports CUDA up to {gpu.cuda}"
    return gpu, [Check("GPU", "ok", text), Check("driver", "ok", driver), _toolkit()]


def _driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The kernel module's version: the first word of that file that starts with a digit and contains a point."""
    if not file.is_file():
        return None
    words = file.read_text().split("\n")[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _toolkit() -> Check:
    """The CUDA toolkit, which only building the CUDA library needs."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        fix = "only for tango plugin build: install the CUDA toolkit and put its bin folder on the PATH"
        return Check("CUDA toolkit", "warning", "nvcc is not on the PATH", fix)
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release_line = next((line.strip() for line in output.splitlines() if "release" in line), "")
    return Check("CUDA toolkit", "ok", f"{nvcc}: {release_line.rpartition('release ')[2] or 'unknown version'}")


def _memory(gpu: system.Gpu | None) -> Iterator[Check]:
    host = system.available_host()
    if gpu is None or gpu.integrated:
        shared = ", shared with the GPU" if gpu else ""
        yield Check("memory", "ok", f"{gigabytes(host)} free on the host{shared}")
        return
    try:
        free = system.free(gpu)
    except TangoError as error:
        yield Check("memory", "missing", error.message, error.hint, GPU_BACKENDS)
        return
    yield Check("memory", "ok", f"{gigabytes(free.device)} free on the GPU, {gigabytes(host)} on the host")
