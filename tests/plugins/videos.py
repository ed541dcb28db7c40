"""Small videos to prune: features, salience and timestamps with cuts, still and moving positions."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tango_plugins import PruneParams


def video(frames, grid, width, seed=0, cuts=(), moving=0.5, noise=0.1, dtype=np.float32):
    """A video whose positions repeat with little noise, except that a share ``moving`` of them changes freely."""
    rng = np.random.default_rng(seed)
    L = grid[0] * grid[1]
    X = np.empty((frames, L, width), dtype)
    for f in range(frames):
        if f == 0 or f in cuts:
            scene = rng.standard_normal((L, width))
            moves = rng.random(L) < moving
        X[f] = scene + noise * rng.standard_normal((L, width)) * np.where(moves, 10, 1)[:, None]
    A = rng.random((frames, L)).astype(np.float32)
    t = np.cumsum(rng.uniform(0.1, 2, frames)).astype(np.float32)
    return X, A, t


RATIOS = st.sampled_from([0.01, 0.05, 0.1, 0.15, 0.25, 0.3333, 0.5, 0.75, 0.9, 1.0])


@st.composite
def cases(draw, **fixed):
    """A video and parameters that fit it."""
    grid = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    frames = draw(st.integers(1, 7))
    cuts = draw(st.sets(st.integers(1, 7), max_size=3))
    clip = video(
        frames,
        grid,
        draw(st.integers(1, 20)),
        seed=draw(st.integers(0, 2**32)),
        cuts=cuts,
        moving=draw(st.sampled_from([0, 0.3, 0.7, 1])),
        dtype=draw(st.sampled_from([np.float16, np.float32, np.float64])),
    )
    options = {
        "retention_ratio": draw(RATIOS),
        "context_ratio": draw(st.sampled_from([0, 0.25, 0.4, 1])),
        "expansion": draw(st.sampled_from([1, 1.5, 3])),
        "anchor_weight": draw(st.sampled_from([0, 0.6, 1])),
        "neighbors": draw(st.integers(1, 9)),
        "merge_order": draw(st.sampled_from(["anchor", "density"])),
        "budget": draw(st.sampled_from(["paper", "exact"])),
    }
    return clip, PruneParams(grid=grid, **(options | fixed))
