"""The Tango operator: prune the visual tokens of a video to the tenth that matters (arXiv 2604.09547)."""

from tango_plugins.errors import TangoError
from tango_plugins.params import PruneParams

__all__ = ["PruneParams", "TangoError"]
