"""What a measurement was made on: machine, versions, and the GPU's clocks, power and temperature as they were found."""

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
#: What nvidia-smi is asked for, by the name that it bears here.
_QUERIES = {
    "driver": "driver_version",
    "performance_state": "pstate",
    "sm_mhz": "clocks.sm",
    "sm_most_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_watts": "power.draw",
    "power_limit_watts": "power.limit",
    "celsius": "temperature.gpu",
    "utilization_percent": "utilization.gpu",
    "memory_used_mib": "memory.used",
    "mig": "mig.mode.current",
}
#: Those that are no numbers.
_NAMES = ("driver", "performance_state", "mig")
_PATIENCE = 30  # seconds that it may take


def machine() -> dict[str, Any]:
    """The host, the GPU that CUDA sees first (None where there is none), and versions of what is installed."""
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
    """Clocks, power, temperature and processes of the GPU at this moment, as nvidia-smi tells them.

    A figure that it does not tell is None. ``processes`` are the others on the GPU that it sees: pid, name, MiB.

    Returns:
        The figures, or ``missing``: why there are none.
    """
    try:
        bus = check(cudart().cudaDeviceGetPCIBusId(32, 0)).split(b"\0")[0].decode()
        (line,) = _ask(bus, f"--query-gpu={','.join(_QUERIES.values())}")
        found = zip(_QUERIES, line.split(", "), strict=True)
        figures = {name: text if name in _NAMES else _number(text) for name, text in found}
        others = _ask(bus, "--query-compute-apps=pid,process_name,used_memory")
        return figures | {"processes": [_named(each) for each in others if not each.startswith(f"{os.getpid()},")]}
    except TangoError as error:
        return {"missing": error.message}
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"missing": f"nvidia-smi cannot be asked: {error}"}


def placeless(source: str) -> str:
    """A hub id as it is, of an absolute path its last part: where it lies is the machine's own affair."""
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


def _ask(bus: str, query: str) -> list[str]:
    command = ["nvidia-smi", "-i", bus, query, "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE)
    return told.stdout.strip().splitlines()


def _named(process: str) -> str:
    """``7, /usr/bin/other, 512`` → ``7, other, 512``."""
    pid, *name, used = process.split(", ")
    return f"{pid}, {placeless(', '.join(name))}, {used}"


def _number(text: str) -> float | None:
    """``1980`` → 1980.0, ``[N/A]`` → None."""
    return None if text.startswith("[") else float(text)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.machine()
