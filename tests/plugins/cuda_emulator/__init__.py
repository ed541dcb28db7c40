"""Compiles kernels of the CUDA library for a CPU: one thread per GPU thread (README.md)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tango_plugins.native_library import NATIVE

HERE = Path(__file__).parent

_TENSORRT = ("plugin", "plugin_v2", "plugin_v3", "prune", "table")

#: What can be emulated.
SOURCES: dict[str, tuple[str | Path, ...]] = {
    "decode": ("src/decode/decode.cu", "src/decode/batch.cu", "src/decode/shape.cu"),
    # It needs "products" or "cublaslt".
    "linear": ("src/linear/linear.cu", "src/linear/slabs.cu", "src/linear/int8.cu", "src/linear/interleave.cu"),
    "products": ("src/linear/fp16.cu", "src/linear/fp8.cu", HERE / "product.cpp"),
    "cublaslt": ("src/linear/fp16.cu", "src/linear/fp8.cu", "src/linear/cublaslt.cu"),
    "attention": ("src/attention/prefill.cu", "src/attention/shares.cu"),
    "attention_sm90": ("src/attention/prefill.cu", "src/attention/prefill_sm90.cu", "src/attention/shares.cu"),
    "vision": ("src/attention/vision.cu",),
    "vision_sm90": ("src/attention/vision.cu", "src/attention/vision_sm90.cu"),
    "rotation": ("src/attention/patch_rotation.cu",),
    "activation": ("src/elementwise/activation.cu", "src/elementwise/gated.cu"),
    "argmax": ("src/elementwise/argmax.cu",),
    "norm": ("src/elementwise/norm.cu",),
    "rows": ("src/elementwise/rows.cu",),
    "thin": ("src/thin/thin.cu",),
    "resize": ("src/frames/resize.cu",),
    "patches": ("src/frames/patches.cu",),
    "operators": ("adapters/operators.cpp",),
    "onnxruntime": ("adapters/onnxruntime/custom_operators.cpp",),
    # Needs TensorRT's headers. The plugin that prunes fails in it.
    "tensorrt": (HERE / "no_prune.cpp", *(f"adapters/tensorrt/{name}.cpp" for name in _TENSORRT)),
    "faults": (HERE / "faults.cu",),
}
COMMON = (
    "src/linear/matrix.cpp",
    "src/common/check.cpp",
    "src/common/device.cu",
    "src/common/library.cpp",
    HERE / "cuda_runtime.cpp",
)


def compiled(
    folder: Path,
    *names: str,
    sms: int = 16,
    shared_bytes: int = 227 << 10,
    capability: tuple[int, int] = (9, 0),
    flags: tuple[str, ...] = (),
    headers: Path | None = None,
) -> Path:
    """Builds a shared library of unmodified sources.

    Args:
        folder: Where it is built.
        names: Keys of ``SOURCES``.
        sms: SMs of the emulated GPU.
        shared_bytes: Largest shared memory of a block on it.
        capability: Its compute capability.
        flags: More flags for the host compiler.
        headers: Folder of TensorRT's.

    Returns:
        The library.
    """
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    # The host compiler does not know CUDA's attributes and pragmas.
    host = ",".join(("-fPIC", "-pthread", "-Wall", "-Werror", "-Wno-attributes", "-Wno-unknown-pragmas", *flags))
    command = ["nvcc", "-x", "c++", "-std=c++20", "-O1", "-shared", "-cudart", "none", "-Xcompiler", host]
    command += ["-Xlinker", "-Bsymbolic"]  # torch with CUDA makes the real runtime's functions global
    defines = {
        "TANGO_PLATFORM_HEADER": '"platform.h"',
        "TANGO_ONNXRUNTIME_PROVIDER": '"CPUExecutionProvider"',
        "TANGO_EMULATED_SMS": sms,
        "TANGO_EMULATED_SHARED_BYTES": shared_bytes,
        "TANGO_EMULATED_MAJOR": capability[0],
        "TANGO_EMULATED_MINOR": capability[1],
    }
    if any(name.endswith("_sm90") for name in names):
        defines["TANGO_SM90A"] = 1
    command += [f"-D{name}={value}" for name, value in defines.items()]
    command += [f"-I{path}" for path in (HERE, NATIVE, NATIVE / "src", NATIVE / "include")]
    command += ["-isystem", str(headers)] if headers else []
    sources = [NATIVE / source for part in (COMMON, *(SOURCES[name] for name in names)) for source in part]
    library = folder / "library.so"
    subprocess.run([*command, *map(str, sources), "-o", str(library)], check=True)
    return library
