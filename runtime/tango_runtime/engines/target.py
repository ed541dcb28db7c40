"""This machine, as a target of engines."""

from __future__ import annotations

from tango_runtime.engines.spec import Target
from tango_runtime.system import gpu as system


def current_target(tensorrt: str) -> Target:
    """This machine, for :func:`tango_runtime.engines.plan_engines` and :func:`tango_runtime.engines.find`.

    Args:
        tensorrt: ``tensorrt.__version__``.

    Raises:
        TangoError: There is no GPU, or the TensorRT plugin cannot be loaded.
    """
    gpu, plugin = system.gpu(), system.plugin()
    return Target(tensorrt, gpu.compute_capability, gpu.name, plugin.interface if plugin else None)
