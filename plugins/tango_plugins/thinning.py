"""Inner pruning: a decoder drops some of the video's rows between two of its layers. In NumPy and fp64.

The code of Tango's authors does it for LLaVA-Video, before layer 18 of 28. There, the layer whose attention decides has
no causal mask during the prefill; here every layer has one.

Letters: N rows of the prompt, V of them the video's, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tango_plugins.reference import Floats, Ints, Reals, normalize

#: Weight of a kept row when others are merged into it (the authors' code).
OWN_WEIGHT = 0.6


@dataclass(frozen=True)
class Thinning:
    """Which rows of a prompt are thinned, and to how many.

    Attributes:
        begin: The video's first row.
        rows: V, row ends included.
        kept: How many of them stay.
    """

    begin: int
    rows: int
    kept: int


def thin(x: Reals, share: Reals, thinning: Thinning) -> tuple[Reals, Ints]:
    """Keeps the video's rows that the prompt's last row attends to most, and merges the others into them.

    Args:
        x: [N, D], output of a layer; fp16, fp32 or fp64.
        share: [N], attention of the last row to each row in that layer, mean over the heads.
        thinning: Which rows may be dropped.

    Returns:
        (the rows that stay [M, D], in the dtype of x; where they were [M], ascending). Ties go to the lower row.
    """
    begin, end = thinning.begin, thinning.begin + thinning.rows
    by_share = begin + np.argsort(-share[begin:end].astype(np.float64), kind="stable")
    chosen, rest = by_share[: thinning.kept], np.sort(by_share[thinning.kept :])
    stay = np.concatenate((np.arange(begin), np.sort(chosen), np.arange(end, len(x))))
    merged = x.copy()
    if len(chosen):
        merged[chosen] = merge(x, chosen, rest)
    return merged[stay], stay


def merge(x: Reals, chosen: Ints, rest: Ints) -> Floats:
    """Merges the other rows into the chosen ones; returns these in the order of ``chosen``.

    Each other row joins the chosen row of highest cosine, the first of equal ones. A chosen row becomes 0.6 of itself
    and 0.4 of the mean of itself and what joined it.
    """
    own = x[chosen].astype(np.float64)
    others = x[rest].astype(np.float64)
    owner = (normalize(others) @ normalize(own).T).argmax(axis=1)
    total = own.copy()
    np.add.at(total, owner, others)
    members = 1 + np.bincount(owner, minlength=len(chosen))
    merged: Floats = OWN_WEIGHT * own + (1 - OWN_WEIGHT) * total / members[:, None]
    return merged
