"""The backends: a name, and where it lives."""

from __future__ import annotations

from tango_plugins import TangoError
from tango_runtime.backends.base import Stages
from tango_runtime.bundle import Bundle

#: Engines, the fastest first.
ENGINES = ("tensorrt", "onnxruntime-cuda", "onnxruntime-cpu")


def select(bundle: Bundle, engine: str = "auto", *, threads: int = 0) -> Stages:
    """Loads a bundle's graphs in an engine.

    Args:
        bundle: The bundle.
        engine: One of ``ENGINES``; ``auto`` takes the first that this machine has, and its ``why`` tells what was
            missing for those before it.
        threads: Threads of one operator on a CPU; 0 takes one for each core.

    Raises:
        TangoError: There is no such engine, or it cannot load the bundle.
    """
    if engine != "auto":
        if engine not in ENGINES:
            raise TangoError(f"there is no engine {engine!r}", f"known are auto, {', '.join(ENGINES)}")
        return _open(bundle, engine, threads)
    missing: list[str] = []
    for name in ENGINES:
        try:
            stages = _open(bundle, name, threads)
        except TangoError as error:
            missing.append(f"no {name}: {error.message}")
            hint = error.hint
            continue
        stages.why = "; ".join(missing)
        return stages
    raise TangoError(f"no engine can run {bundle.path}: {'; '.join(missing)}", hint)


def _open(bundle: Bundle, engine: str, threads: int) -> Stages:
    """Loads an engine; it is imported only now, since few machines have all of them."""
    if engine == "tensorrt":
        from tango_runtime.backends.cuda.tensorrt import open_stages

        return open_stages(bundle)
    if engine == "onnxruntime-cuda":
        from tango_runtime.backends.cuda.ort import open_stages

        return open_stages(bundle)
    from tango_runtime.backends.ort_cpu import OnnxRuntimeStages

    return OnnxRuntimeStages(bundle, threads=threads)
