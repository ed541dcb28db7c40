"""A bundle's graphs on ONNX Runtime's CUDA provider."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from typing import Any

from tango_plugins import TangoError, driver, native_library
from tango_runtime.backends.cuda.backend import CudaBackend, open_stream
from tango_runtime.backends.cuda.ort_fused import FusedOrtRunner
from tango_runtime.backends.cuda.ort_runner import CUDA, PROVIDER
from tango_runtime.bundle import Bundle
from tango_runtime.system.precisions import require_precisions


def open_backend(bundle: Bundle, threads: int = 0, *, nvdec: bool = False) -> CudaBackend:
    """Loads a bundle's graphs on the GPU.

    Raises:
        TangoError: ONNX Runtime with CUDA is not installed or cannot be used, there is no GPU or one without a graph's
            precision, a graph cannot be loaded, or the CUDA library is not built.
    """
    with ThreadPoolExecutor(1) as thread:  # each of the two takes a tenth of a second
        opening = thread.submit(open_stream)
        onnxruntime = onnxruntime_with_cuda()
        stream = opening.result()
    require_precisions(bundle, bundle.manifest.graphs, driver.gpu().compute_capability)
    graphs = FusedOrtRunner(onnxruntime, bundle, stream, CUDA, native_library.installed())
    return CudaBackend(bundle, graphs, stream, nvdec=nvdec)


def onnxruntime_with_cuda() -> Any:
    """The module, with CUDA's libraries loaded.

    Raises:
        TangoError: It is not installed, or is the one without CUDA.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise TangoError("ONNX Runtime is not installed", "pip install 'tango-edge[gpu]'") from error
    if PROVIDER not in onnxruntime.get_available_providers():
        raise TangoError(
            f"ONNX Runtime {onnxruntime.__version__} is the one without CUDA",
            "pip uninstall onnxruntime, then pip install 'tango-edge[gpu]': the two overwrite each other",
        )
    if hasattr(onnxruntime, "preload_dlls"):  # finds CUDA's libraries in the nvidia-* packages
        with redirect_stdout(sys.stderr):  # its messages are no part of an answer
            onnxruntime.preload_dlls()
    return onnxruntime
