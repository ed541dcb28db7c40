"""Conditions of a measurement: machine, versions, and the GPU's clocks, power and temperature."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tango_plugins import TangoError
from tango_runtime.backends.cuda.device import check, cudart
from tango_runtime.system.gpu import gpu
from tango_runtime.system.packages import installed_version

_PACKAGES = (
    "tango-edge",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "cuda-bindings",
    "torch",
    "transformers",
)
#: Our name of a figure → nvidia-smi's.
_QUERIES = {
    "driver": "driver_version",
    "performance_state": "pstate",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_watts": "power.draw",
    "power_limit_watts": "power.limit",
    "celsius": "temperature.gpu",
    "utilization_percent": "utilization.gpu",
    "memory_used_mib": "memory.used",
    "mig": "mig.mode.current",
}
#: Figures that are not numbers.
_TEXTS = ("driver", "performance_state", "mig")
_TIMEOUT_S = 30


def machine() -> dict[str, Any]:
    """The host, the first GPU that CUDA sees (None without one), and versions of installed packages."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "packages": {name: found for name in _PACKAGES if (found := installed_version(name))},
        "gpu": _gpu(),
    }


def gpu_state() -> dict[str, Any]:
    """Current clocks, power, temperature and processes of the GPU, from nvidia-smi.

    A figure that it does not report is None. ``processes`` are the other processes on the GPU: pid, name, MiB.

    Returns:
        The figures, or ``missing``: why there are none.
    """
    try:
        bus = check(cudart().cudaDeviceGetPCIBusId(32, 0)).split(b"\0")[0].decode()
        (line,) = _query(bus, f"--query-gpu={','.join(_QUERIES.values())}")
        found = zip(_QUERIES, line.split(", "), strict=True)
        figures = {name: text if name in _TEXTS else _number(text) for name, text in found}
        others = _query(bus, "--query-compute-apps=pid,process_name,used_memory")
        return figures | {"processes": [_named(each) for each in others if not each.startswith(f"{os.getpid()},")]}
    except TangoError as error:
        return {"missing": error.message}
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"missing": f"nvidia-smi failed: {error}"}


def without_folder(source: str) -> str:
    """A hub id as it is, an absolute path without its folder, which only this machine has."""
    return Path(source).name if Path(source).is_absolute() else source


def _gpu() -> dict[str, Any] | None:
    try:
        found = gpu()
        runtime = check(cudart().cudaRuntimeGetVersion())
    except TangoError:
        return None
    return {
        "name": found.name,
        "compute_capability": found.compute_capability,
        "memory": found.memory,
        "cuda_driver": found.cuda,
        "cuda_runtime": f"{runtime // 1000}.{runtime % 1000 // 10}",
    }


def _query(bus: str, query: str) -> list[str]:
    command = ["nvidia-smi", "-i", bus, query, "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
    return result.stdout.strip().splitlines()


def _named(process: str) -> str:
    """``7, /usr/bin/other, 512`` → ``7, other, 512``."""
    pid, *name, used = process.split(", ")
    return f"{pid}, {without_folder(', '.join(name))}, {used}"


def _number(text: str) -> float | None:
    """``1980`` → 1980.0, ``[N/A]`` → None."""
    return None if text.startswith("[") else float(text)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.machine()
