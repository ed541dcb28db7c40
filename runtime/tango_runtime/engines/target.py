"""This machine, as a target of engines."""

from __future__ import annotations

from tango_runtime.engines.spec import Target
from tango_runtime.system import gpu as system


def current_target(tensorrt: str) -> Target:
    """This machine, for :func:`tango_runtime.engines.plan_engines` and :func:`tango_runtime.engines.find`.

    Args:
        tensorrt: ``tensorrt.__version__``.

    Raises:
        TangoError: There is no GPU, or the library of the TensorRT plugins cannot be loaded.
    """
    return target_of(system.gpu(), tensorrt, system.plugin())


def target_of(gpu: system.Gpu, tensorrt: str, plugin: system.Plugin | None) -> Target:
    """A machine as a target: its GPU, its version of TensorRT, and what there is of the plugins."""
    usable = plugin is not None and plugin.serves(tensorrt)
    return Target(tensorrt, gpu.compute_capability, gpu.name, plugin.interface if plugin and usable else None)
