"""Prune the visual tokens of any model with the NumPy reference: python reference.py"""

import numpy as np

from tango_plugins import PruneParams
from tango_plugins.reference import prune

FRAMES, GRID, WIDTH = 16, (8, 8), 128

# In place of a vision tower: features [F, L, D], salience [F, L] and seconds [F]. Every fourth frame is another scene.
rng = np.random.default_rng(0)
scenes = rng.standard_normal((FRAMES // 4, GRID[0] * GRID[1], WIDTH))
features = (np.repeat(scenes, 4, axis=0) + 0.1 * rng.standard_normal((FRAMES, *scenes.shape[1:]))).astype(np.float32)
salience = rng.random(features.shape[:2], dtype=np.float32)
seconds = np.arange(FRAMES, dtype=np.float32)

# Sinks are grid positions whose salience means nothing. They belong to a vision tower; this one has none.
pruned = prune(features, salience, seconds, PruneParams(retention_ratio=0.1, grid=GRID, sink_positions=()))

print(f"kept {pruned.count} of {salience.size} tokens: {pruned.tokens.dtype} {list(pruned.tokens.shape)}")
print(f"{pruned.merged.sum()} of them are merged from several")
print("segments:", pruned.segments.tolist())
