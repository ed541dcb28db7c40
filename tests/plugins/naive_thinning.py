"""Inner pruning restated row by row. It shares no code with the reference."""

from __future__ import annotations

import numpy as np


def thin(x, share, begin, count, keep):
    """Rows [N, D] → (those that stay, where they were): of ``count`` rows from ``begin`` on, ``keep`` stay."""
    video = range(begin, begin + count)
    top = sorted(video, key=lambda row: (-share[row], row))[:keep]
    joined = {row: [x[row]] for row in top}
    for row in video:
        if row not in joined and top:
            cosines = [cosine(x[row], x[one]) for one in top]
            joined[top[int(np.argmax(cosines))]].append(x[row])
    stay = [row for row in range(len(x)) if row not in video or row in joined]
    return np.array([0.6 * x[r] + 0.4 * np.mean(joined[r], 0) if r in joined else x[r] for r in stay]), stay


def cosine(a, b):
    lengths = max(np.linalg.norm(a), 1e-12) * max(np.linalg.norm(b), 1e-12)
    return float(a @ b / lengths)
