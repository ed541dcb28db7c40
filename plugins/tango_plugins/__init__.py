"""The Tango operator, which prunes the visual tokens of a video (arXiv 2604.09547), and CUDA kernels for a decoder."""

from tango_plugins.errors import TangoError
from tango_plugins.params import PruneParams

__all__ = ["PruneParams", "TangoError"]
