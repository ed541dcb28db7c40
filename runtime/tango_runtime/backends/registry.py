"""The backends: a name, and where it lives."""

from __future__ import annotations

from tango_plugins import TangoError
from tango_runtime.backends.base import Backend
from tango_runtime.bundle import Bundle

#: Engines, the fastest first.
BACKENDS = ("tensorrt", "ort-cuda", "ort-cpu")


def select(bundle: Bundle, engine: str = "auto", *, threads: int = 0) -> Backend:
    """Loads a bundle's graphs in an engine.

    Args:
        bundle: The bundle.
        engine: One of ``BACKENDS``; ``auto`` takes the first that this machine has, and its ``why`` tells what was
            missing for those before it.
        threads: Threads of one operator on a CPU; 0 takes one for each core.

    Raises:
        TangoError: There is no such engine, or it cannot load the bundle.
    """
    if engine != "auto":
        if engine not in BACKENDS:
            raise TangoError(f"there is no engine {engine!r}", f"known are auto, {', '.join(BACKENDS)}")
        return _open(bundle, engine, threads)
    missing: list[str] = []
    for name in BACKENDS:
        try:
            stages = _open(bundle, name, threads)
        except TangoError as error:
            missing.append(f"no {name}: {error.message}")
            hint = error.hint
            continue
        stages.fallback_reason = "; ".join(missing)
        return stages
    raise TangoError(f"no engine can run {bundle.path}: {'; '.join(missing)}", hint)


def _open(bundle: Bundle, engine: str, threads: int) -> Backend:
    """Loads an engine; it is imported only now, since few machines have all of them."""
    if engine == "tensorrt":
        from tango_runtime.backends.cuda.tensorrt import open_backend

        return open_backend(bundle)
    if engine == "ort-cuda":
        from tango_runtime.backends.cuda.ort import open_backend

        return open_backend(bundle)
    from tango_runtime.backends.ort_cpu import OrtCpuBackend

    return OrtCpuBackend(bundle, threads=threads)
