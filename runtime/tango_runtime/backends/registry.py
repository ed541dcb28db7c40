"""The backends: the only list of them, the fastest first."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from tango_plugins import TangoError
from tango_runtime.backends.base import Backend
from tango_runtime.bundle import Bundle


@dataclass(frozen=True)
class Entry:
    """A backend that may be installed here.

    Attributes:
        module: Where its ``open_backend(bundle, threads)`` is, on a GPU with ``nvdec``. It is imported when it is used:
            few machines can import all of them.
        extra: The extra of tango-edge that installs what it needs.
        summary: What it is, in a few words.
        on_gpu: Whether it computes on a GPU.
    """

    module: str
    extra: str
    summary: str
    on_gpu: bool


BACKENDS: dict[str, Entry] = {
    "tensorrt": Entry("tango_runtime.backends.cuda.tensorrt", "tensorrt", "TensorRT engines of `tango build`", True),
    "ort-cuda": Entry("tango_runtime.backends.cuda.ort", "gpu", "ONNX Runtime on an NVIDIA GPU", True),
    "ort-cpu": Entry("tango_runtime.backends.ort_cpu", "cpu", "ONNX Runtime on the CPU", False),
}


def select(bundle: Bundle, backend: str = "auto", *, threads: int = 0, nvdec: bool = False) -> Backend:
    """Loads a bundle's graphs in a backend.

    Args:
        bundle: The bundle.
        backend: A name in ``BACKENDS``; ``auto`` takes the first that can be used here, and its ``fallback_reason``
            says what those before it were missing.
        threads: Threads of one operator on a CPU; 0 takes one for each core.
        nvdec: Whether the GPU also decodes video files, where it can.

    Raises:
        TangoError: There is no such backend, or it cannot load the bundle, or has no GPU that decodes.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise TangoError(f"there is no backend {backend!r}", f"known are auto, {', '.join(BACKENDS)}")
        return _open(bundle, backend, threads, nvdec)
    reasons: list[str] = []
    for name in BACKENDS:
        try:
            found = _open(bundle, name, threads, nvdec)
        except TangoError as error:
            reasons.append(f"no {name}: {error.message}")
            hint = error.hint
            continue
        found.fallback_reason = "; ".join(reasons)
        return found
    raise TangoError(f"no backend can run {bundle.path}: {'; '.join(reasons)}", hint)


def _open(bundle: Bundle, name: str, threads: int, nvdec: bool) -> Backend:
    entry, options = BACKENDS[name], {"nvdec": True} if nvdec else {}
    if nvdec and not entry.on_gpu:
        raise TangoError(f"{name} has no GPU that decodes videos", "leave out --nvdec or --gpu-decoders")
    backend: Backend = importlib.import_module(entry.module).open_backend(bundle, threads, **options)
    return backend
