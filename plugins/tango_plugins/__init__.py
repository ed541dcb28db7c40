"""The Tango operator, which prunes the visual tokens of a video (arXiv 2604.09547), and CUDA kernels for models."""

from tango_plugins.errors import TangoError
from tango_plugins.params import PruneParams
from tango_plugins.version import package_version

__all__ = ["PruneParams", "TangoError"]


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return package_version()
