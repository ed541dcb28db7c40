"""What the precision of a bundle's graphs asks of a GPU."""

from __future__ import annotations

from collections.abc import Iterable

from tango_plugins import TangoError
from tango_runtime.bundle import Bundle, GraphName
from tango_runtime.util.versions import release

#: The first compute capability with products of FP8 (NVIDIA's tables of tensor cores; tango/fp8.h).
FP8_CAPABILITY = "8.9"


def require_precisions(bundle: Bundle, graphs: Iterable[GraphName], compute_capability: str) -> None:
    """Rejects graphs in a precision that a GPU does not have.

    Args:
        bundle: The bundle.
        graphs: Some of its graphs.
        compute_capability: The GPU's, such as ``8.7``.

    Raises:
        TangoError: It has no FP8, and a graph needs it.
    """
    specs = {name: bundle.manifest.graphs[name].quantization for name in graphs}
    found = [name for name, quantization in specs.items() if quantization and quantization.precision == "fp8"]
    if found and release(compute_capability) < release(FP8_CAPABILITY):
        raise TangoError(
            f"{' and '.join(found)} of {bundle.path}: fp8 needs a GPU of compute capability {FP8_CAPABILITY} or later, "
            f"and this one has {compute_capability}",
            "use the fp16 bundle that it was made from, or calibrate that one to int8",
        )
