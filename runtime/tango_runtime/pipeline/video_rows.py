"""Kept tokens that are on the host, as an evaluation's baselines make them → what the decoder gets of the video."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_plugins.row_ends import with_row_ends
from tango_runtime.backends.base import Backend
from tango_runtime.bundle import Manifest


def video_rows(
    manifest: Manifest, backend: Backend, tokens: NDArray[Any], indices: NDArray[np.integer[Any]]
) -> NDArray[Any]:
    """Kept tokens [K, D], at flat indices [K], with the row ends that the model wants → [K + R, D]."""
    end = manifest.prompt.row_end
    if end is None:
        return tokens
    newline = backend.to_host(backend.embed(np.array([end])))[0]
    return with_row_ends(tokens, indices, manifest.params.grid[1], newline)
