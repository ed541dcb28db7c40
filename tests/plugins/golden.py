"""The reference's results for a few small videos. ``python -m tests.plugins.golden`` writes golden.npz again.

The file also has the inputs, so that any other implementation of the operator can be compared with it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tango_plugins import PruneParams
from tango_plugins.reference import prune
from tests.plugins.videos import video

PATH = Path(__file__).with_name("golden.npz")

GRID = (4, 5)
VIDEOS = {
    "cuts": {"frames": 9, "grid": GRID, "width": 26, "seed": 1, "cuts": (4, 5), "moving": 0.5},
    "moving": {"frames": 5, "grid": GRID, "width": 36, "seed": 2, "moving": 0.9, "dtype": np.float16},
}
PARAMS = {
    "tenth": PruneParams(grid=GRID),
    "density": PruneParams(0.25, grid=GRID, merge_order="density", sink_positions=(0, 7)),
    "exact": PruneParams(0.3333, grid=GRID, budget="exact", neighbors=3, expansion=2),
}


def inputs() -> dict[str, np.ndarray]:
    """``<video>/features``, ``<video>/salience`` and ``<video>/timestamps`` of each video."""
    named = zip(VIDEOS, (video(**options) for options in VIDEOS.values()), strict=True)
    return {
        f"{v}/{name}": x
        for v, clip in named
        for name, x in zip(("features", "salience", "timestamps"), clip, strict=True)
    }


def outputs(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``<video>/<params>/tokens``, ``indices``, ``segments`` and ``merged`` of each video at each setting."""
    found = {}
    for v in VIDEOS:
        for p, params in PARAMS.items():
            pruned = prune(given[f"{v}/features"], given[f"{v}/salience"], given[f"{v}/timestamps"], params)
            found |= {f"{v}/{p}/{name}": getattr(pruned, name) for name in ("tokens", "indices", "segments", "merged")}
    return found


if __name__ == "__main__":
    given = inputs()
    np.savez_compressed(PATH, **given, **outputs(given))
    print(f"{PATH}: {PATH.stat().st_size} bytes")
