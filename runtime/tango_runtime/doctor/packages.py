"""Checks of what is installed: TensorRT, cuda-bindings, the CUDA library, cuBLASLt and ONNX Runtime."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tango_plugins import TangoError
from tango_plugins.build import info
from tango_runtime.doctor.check import GPU_BACKENDS, ORT_BACKENDS, Check
from tango_runtime.doctor.jetson import jetson_linux, python_is_too_old
from tango_runtime.system import cublaslt
from tango_runtime.system import gpu as system
from tango_runtime.system.kernels import kernels_of
from tango_runtime.system.packages import installed_version
from tango_runtime.util.versions import release

_log = logging.getLogger(__name__)

#: Interpreters that may have a TensorRT that this one does not: JetPack's, and the first on the PATH.
_INTERPRETERS = ("/usr/bin/python3", "python3", "python")
_IMPORT_TIMEOUT_S = 120
#: Major versions of CUDA whose cuda-bindings this project supports.
_MIN_CUDA, _MAX_CUDA = 12, 13
#: The oldest Python that tango-edge runs on, as in pyproject.toml.
_MIN_PYTHON = (3, 10)
_FROM_CPP = "run the engines from C++, as the example does, or flash JetPack 6.2 or later where the board can have it"
_CUDA_PROVIDER = "libonnxruntime_providers_cuda.so"
#: The TensorRT of JetPack 7.1 and of containers for Thor: "Target GPU SM 87 is not supported"
#: (NVIDIA-ISAAC-ROS/isaac-ros-cli#22). JetPack 7.2's has kernels for both.
_WITHOUT_ORIN = (10, 13, 3)


def check_packages(gpu: system.Gpu | None) -> list[Check]:
    """Checks what is installed, for a GPU; None if there is none."""
    tensorrt = tensorrt_version()
    return [_tensorrt(gpu), _bindings(gpu), *_libraries(tensorrt), *_onnxruntime(gpu)]


def tensorrt_version() -> str | None:
    """The version of TensorRT in this Python, None if it cannot be imported."""
    module, _ = try_import("tensorrt")
    return None if module is None else str(module.__version__)


def _tensorrt(gpu: system.Gpu | None) -> Check:
    """TensorRT in this Python, or where else it is."""
    module, reason = try_import("tensorrt")
    if module is not None:
        text = f"{module.__version__}, {module.__file__}"
        if gpu and gpu.compute_capability == "8.7" and release(module.__version__)[:3] == _WITHOUT_ORIN:
            fix = "install the TensorRT of this board's own JetPack; a container for Thor has another"
            return Check("TensorRT", "missing", f"{text}: it has no kernels for sm_87", fix, ("tensorrt",))
        return Check("TensorRT", "ok", text)
    if python_is_too_old(jetson_linux()):
        return Check("TensorRT", "missing", f"{reason}; the JetPack's is for Python 3.8", _FROM_CPP, ("tensorrt",))
    for interpreter, found, python in _other_interpreters():
        text = f"not in this Python, but {found} in {interpreter}"
        fix = (
            f"create an environment that includes it: {interpreter} -m venv --system-site-packages VENV, "
            "then install tango-edge there"
        )
        if release(python) < _MIN_PYTHON:
            text, fix = f"{text}, whose Python {python} is too old for tango-edge", _FROM_CPP
        return Check("TensorRT", "missing", text, fix, ("tensorrt",))
    fix = "on x86-64: pip install 'tango-edge[tensorrt]'; on a Jetson: apt install python3-libnvinfer"
    return Check("TensorRT", "missing", reason, fix, ("tensorrt",))


def _other_interpreters() -> Iterator[tuple[str, str, str]]:
    """Other interpreters that have TensorRT, its version there, and theirs."""
    own = Path(sys.executable).resolve()
    paths = {Path(path).resolve(): path for path in map(shutil.which, _INTERPRETERS) if path}
    for path, name in paths.items():
        if path == own and sys.prefix == sys.base_prefix:
            continue
        _log.info("looking for TensorRT in %s, for up to %d s", name, _IMPORT_TIMEOUT_S)
        command = [name, "-c", "import sys, tensorrt; print(tensorrt.__version__, '%d.%d' % sys.version_info[:2])"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            _log.warning("%s did not import TensorRT within %d s; skipping it", name, _IMPORT_TIMEOUT_S)
            continue
        except OSError:
            continue
        words = done.stdout.split()[-2:]
        if done.returncode == 0 and len(words) == 2:
            yield name, words[0], words[1]


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
    """The CUDA library, cuBLASLt and the TensorRT plugin."""
    fix = "tango plugin build"
    try:
        installed, plugin = info(), system.plugin()
    except TangoError as error:
        return [Check("CUDA library", "missing", error.message, error.hint, GPU_BACKENDS)]
    if installed.library is None:
        return [Check("CUDA library", "missing", "; ".join(installed.passed_over), fix, GPU_BACKENDS)]
    text = f"{installed.library}, {installed.version}; {installed.origin}"
    check = Check("CUDA library", "ok", "; not used: ".join((text, *installed.passed_over)))
    return [check, _cublaslt(installed.library), _tensorrt_plugin(plugin, tensorrt)]


def _cublaslt(library: Path) -> Check:
    """What the CUDA library multiplies matrices of device graphs with."""
    try:
        return Check("cuBLASLt", "ok", f"libcublasLt.so.{cublaslt.cublaslt_version(library)}")
    except TangoError as error:
        return Check("cuBLASLt", "warning", f"no device graphs in fp16 or FP8: {error.message}", error.hint)


def _tensorrt_plugin(plugin: system.Plugin | None, tensorrt: str | None) -> Check:
    """The plugins, which a prune engine and those of device graphs need."""
    fix = "tango plugin build --tensorrt-include FOLDER, with the folder of NvInfer.h"
    if plugin is None:
        return Check("TensorRT plugins", "warning", "not built: no prune engine, no device graphs", fix)
    text = f"{plugin.path}, interface {plugin.interface}, {plugin.api}"
    if tensorrt and not plugin.serves(tensorrt):
        return Check("TensorRT plugins", "warning", f"{text}: not for TensorRT {tensorrt}", fix)
    return Check("TensorRT plugins", "ok", text)


def _onnxruntime(gpu: system.Gpu | None) -> list[Check]:
    cpu, cuda = installed_version("onnxruntime"), installed_version("onnxruntime-gpu")
    if cpu and cuda:
        fix = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu=={cuda}"
        text = f"onnxruntime {cpu} and onnxruntime-gpu {cuda} are both installed and overwrite each other"
        return [Check("ONNX Runtime", "missing", text, fix, ORT_BACKENDS)]
    module, reason = try_import("onnxruntime")
    if module is None:
        return [Check("ONNX Runtime", "missing", reason, "pip install 'tango-edge[cpu]', or [gpu]", ORT_BACKENDS)]
    providers = module.get_available_providers()
    return [Check("ONNX Runtime", "ok", f"{module.__version__}: {', '.join(providers)}"), *_cuda_provider(module, gpu)]


def _cuda_provider(module: Any, gpu: system.Gpu | None) -> Iterator[Check]:
    """ONNX Runtime's CUDA provider, if it is missing or of no use on this GPU."""
    fix = "pip uninstall -y onnxruntime && pip install 'tango-edge[gpu]'"
    if jetson_linux() is not None:
        fix = "build TensorRT engines instead: tango build BUNDLE (the index has no onnxruntime-gpu for a Jetson's GPU)"
    if "CUDAExecutionProvider" not in module.get_available_providers():
        text = "this onnxruntime was built without it"
        yield Check("ONNX Runtime CUDA", "missing", text, fix, ("ort-cuda",))
        return
    kernels = kernels_of(Path(module.__file__).parent / "capi" / _CUDA_PROVIDER)
    if gpu and kernels.known and not kernels.serve(gpu.compute_capability):
        text = f"this onnxruntime has kernels for {kernels}, not for this GPU, {_architecture(gpu)}"
        fix = "build TensorRT engines instead: tango build BUNDLE; or install an onnxruntime-gpu built for this GPU"
        yield Check("ONNX Runtime CUDA", "missing", text, fix, ("ort-cuda",))


def _architecture(gpu: system.Gpu) -> str:
    """``8.7`` → ``sm_87``."""
    return f"sm_{gpu.compute_capability.replace('.', '')}"


def try_import(name: str) -> tuple[Any, str]:
    """A module, or None and why it cannot be imported."""
    if find_spec(name) is None:
        return None, "not installed in this Python"
    try:
        return import_module(name), ""
    except Exception as error:  # a library that it needs is missing, or it was built for another machine
        return None, f"cannot be imported: {error}"
