"""The result of one check, and of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tango_runtime.backends.registry import BACKENDS

Status = Literal["ok", "missing", "warning"]

#: The backends that need a GPU, and those that need ONNX Runtime.
GPU_BACKENDS = tuple(name for name, entry in BACKENDS.items() if entry.on_gpu)
ORT_BACKENDS = tuple(name for name in BACKENDS if name.startswith("ort-"))


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: What was checked.
        status: ``ok``, ``missing``, or ``warning`` for something that is there but will cause trouble.
        text: What was found.
        fix: The command that fixes it, or what else to do; empty if it is ok.
        backends: The backends that cannot run while it is missing.
    """

    name: str
    status: Status
    text: str
    fix: str = ""
    backends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """All checks.

    Attributes:
        checks: In the order of the stack, the GPU first.
    """

    checks: tuple[Check, ...]

    @property
    def ready(self) -> tuple[str, ...]:
        """The backends that can run here, the fastest first."""
        blocked = {backend for check in self.checks if check.status == "missing" for backend in check.backends}
        return tuple(backend for backend in BACKENDS if backend not in blocked)
