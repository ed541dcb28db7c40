"""Checks of this machine: its GPU and driver, and what is installed."""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tango_plugins import TangoError
from tango_plugins.build import info
from tango_runtime.backends.ort_options import int8_saturates
from tango_runtime.doctor.check import GPU_BACKENDS, ORT_BACKENDS, Check
from tango_runtime.system import gpu as system
from tango_runtime.system.packages import installed_version
from tango_runtime.util.units import gigabytes
from tango_runtime.util.versions import release

_log = logging.getLogger(__name__)

#: Interpreters that may have a TensorRT that this one does not: JetPack's, and the first on the PATH.
_INTERPRETERS = ("/usr/bin/python3", "python3", "python")
_IMPORT_TIMEOUT_S = 120
#: Major versions of CUDA whose cuda-bindings this project supports.
_MIN_CUDA, _MAX_CUDA = 12, 13

#: Linux for Tegra → JetPack, from NVIDIA's release notes. A later version is reported as the last known one "or later".
_JETPACKS = {
    (35, 1): "5.0.2",
    (35, 2): "5.1",
    (35, 3): "5.1.1",
    (35, 4): "5.1.2",
    (35, 5): "5.1.3",
    (35, 6): "5.1.4",
    (36, 2): "6.0 DP",
    (36, 3): "6.0",
    (36, 4): "6.1 or 6.2",
    (36, 5): "6.2.2",
    (38, 2): "7.0",
    (38, 4): "7.1",
}


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
    tensorrt, tensorrt_check = _tensorrt()
    checks = (
        Check("Python", "ok", f"{sys.version.split()[0]}, {sys.executable}"),
        _cpu(),
        *gpu_checks,
        *_jetpack(),
        *_memory(gpu),
        tensorrt_check,
        _bindings(gpu),
        *_libraries(tensorrt),
        *_onnxruntime(),
    )
    return Machine(gpu, tensorrt, checks)


def _cpu(file: Path = Path("/proc/cpuinfo")) -> Check:
    """The CPU, and whether INT8 products need ONNX Runtime's exact kernels on it."""
    lines = file.read_text().split("\n") if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    text = next(names, "") or platform.machine()
    if _import("onnxruntime")[0] is not None and int8_saturates():
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


def _jetpack(file: Path = Path("/etc/nv_tegra_release")) -> Iterator[Check]:
    """The JetPack, on a Jetson. The file's first line is ``# R36 (release), REVISION: 4.0, …``."""
    if not file.is_file():
        return
    words = file.read_text().replace(",", " ").split()
    major = next((word[1:] for word in words if word[:1] == "R" and word[1:].isdigit()), "0")
    revision = words[words.index("REVISION:") + 1] if "REVISION:" in words[:-1] else "0"
    line = (int(major), *release(revision)[:1])
    known = [jetpack for tegra, jetpack in _JETPACKS.items() if tegra[0] == line[0] and tegra <= line]
    jetpack = f"JetPack {known[-1]}" + ("" if line in _JETPACKS else " or later") if known else "unknown JetPack"
    yield Check("JetPack", "ok", f"{jetpack} (Linux for Tegra {major}.{revision})")


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


# What is installed.


def _tensorrt() -> tuple[str | None, Check]:
    """The version of TensorRT in this Python, None if there is none, and the check of it."""
    module, reason = _import("tensorrt")
    if module is not None:
        return module.__version__, Check("TensorRT", "ok", f"{module.__version__}, {module.__file__}")
    for interpreter, found in _other_interpreters():
        text = f"not in this Python, but {found} in {interpreter}"
        fix = (
            f"create an environment that includes it: {interpreter} -m venv --system-site-packages VENV, "
            "then install tango-edge there"
        )
        return None, Check("TensorRT", "missing", text, fix, ("tensorrt",))
    fix = "on x86-64: pip install 'tango-edge[tensorrt]'; on a Jetson: apt install python3-libnvinfer"
    return None, Check("TensorRT", "missing", reason, fix, ("tensorrt",))


def _other_interpreters() -> Iterator[tuple[str, str]]:
    """Other interpreters that have TensorRT, and its version there."""
    own = Path(sys.executable).resolve()
    paths = {Path(path).resolve(): path for path in map(shutil.which, _INTERPRETERS) if path}
    for path, name in paths.items():
        if path == own and sys.prefix == sys.base_prefix:
            continue
        _log.info("looking for TensorRT in %s, for up to %d s", name, _IMPORT_TIMEOUT_S)
        command = [name, "-c", "import tensorrt; print(tensorrt.__version__)"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            _log.warning("%s did not import TensorRT within %d s; skipping it", name, _IMPORT_TIMEOUT_S)
            continue
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.strip():
            yield name, done.stdout.split()[-1]


def _bindings(gpu: system.Gpu | None) -> Check:
    """cuda-bindings; its major version is CUDA's and must not be above the driver's."""
    found = installed_version("cuda-bindings")
    newest = release(gpu.cuda)[0] if gpu else _MAX_CUDA
    if newest < _MIN_CUDA:
        text = f"{found or 'not installed'}; the driver supports CUDA up to {newest}"
        fix = f"update the driver, or the JetPack: CUDA {_MIN_CUDA} or later is needed"
        return Check("cuda-bindings", "missing", text, fix, GPU_BACKENDS)
    fix = f"pip install 'cuda-bindings=={min(newest, _MAX_CUDA)}.*'"
    if found is None:
        return Check("cuda-bindings", "missing", "not installed", fix, GPU_BACKENDS)
    if release(found)[0] > newest:
        text = f"{found} is for CUDA {release(found)[0]}, the driver supports up to {newest}"
        return Check("cuda-bindings", "missing", text, fix, GPU_BACKENDS)
    return Check("cuda-bindings", "ok", found)


def _libraries(tensorrt: str | None) -> list[Check]:
    """The CUDA library and the TensorRT plugin."""
    fix = "tango plugin build"
    try:
        installed, plugin = info(), system.plugin()
    except TangoError as error:
        return [Check("CUDA library", "missing", error.message, error.hint, GPU_BACKENDS)]
    if installed.library is None:
        return [Check("CUDA library", "missing", "; ".join(installed.passed_over), fix, GPU_BACKENDS)]
    text = f"{installed.library}, {installed.version}; {installed.origin}"
    check = Check("CUDA library", "ok", "; not used: ".join((text, *installed.passed_over)))
    return [check, _tensorrt_plugin(plugin, tensorrt)]


def _tensorrt_plugin(plugin: system.Plugin | None, tensorrt: str | None) -> Check:
    """The plugins, which a prune engine and those of device graphs need."""
    fix = "tango plugin build --tensorrt-include FOLDER, with the folder of NvInfer.h"
    if plugin is None:
        return Check("TensorRT plugins", "warning", "not built: no prune engine, no device graphs", fix)
    text = f"{plugin.path}, interface {plugin.interface}, {plugin.api}"
    if tensorrt and not plugin.serves(tensorrt):
        return Check("TensorRT plugins", "warning", f"{text}: not for TensorRT {tensorrt}", fix)
    return Check("TensorRT plugins", "ok", text)


def _onnxruntime() -> list[Check]:
    cpu, gpu = installed_version("onnxruntime"), installed_version("onnxruntime-gpu")
    if cpu and gpu:
        fix = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu=={gpu}"
        text = f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed and overwrite each other"
        return [Check("ONNX Runtime", "missing", text, fix, ORT_BACKENDS)]
    module, reason = _import("onnxruntime")
    if module is None:
        return [Check("ONNX Runtime", "missing", reason, "pip install 'tango-edge[cpu]', or [gpu]", ORT_BACKENDS)]
    providers = module.get_available_providers()
    checks = [Check("ONNX Runtime", "ok", f"{module.__version__}: {', '.join(providers)}")]
    if "CUDAExecutionProvider" not in providers:
        fix = "pip uninstall -y onnxruntime && pip install 'tango-edge[gpu]'"
        if platform.machine() != "x86_64":
            fix = "PyPI has it for x86-64 only: build TensorRT engines instead, tango build BUNDLE"
        text = "this onnxruntime was built without it"
        checks.append(Check("ONNX Runtime CUDA", "missing", text, fix, ("ort-cuda",)))
    return checks


def _import(name: str) -> tuple[Any, str]:
    """A module, or None and why it cannot be imported."""
    if find_spec(name) is None:
        return None, "not installed in this Python"
    try:
        return import_module(name), ""
    except Exception as error:  # a library that it needs is missing, or it was built for another machine
        return None, f"cannot be imported: {error}"
