"""Row ends: a model trained with a token after every row of a frame's grid gets one after each row that is kept.

In NumPy: the result on a CPU, and the order in which tango/rows.h gathers rows on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def row_order(indices: NDArray[np.integer[Any]], columns: int) -> NDArray[np.int32]:
    """Where each row of the decoder's input comes from.

    Args:
        indices: [K], flat index f·L + l of each kept token, ascending.
        columns: Width of a frame's grid.

    Returns:
        [K + R] int32, a position in ``indices``, or −1 for a row end. A row end follows the last kept token of each of
        the R grid rows that keep any, over all frames.
    """
    row = indices // columns
    last = np.append(row[1:] != row[:-1], True)[: len(row)]
    return np.insert(np.arange(len(row), dtype=np.int32), np.flatnonzero(last) + 1, -1)


def with_row_ends(
    tokens: NDArray[Any], indices: NDArray[np.integer[Any]], columns: int, end: NDArray[Any]
) -> NDArray[Any]:
    """Kept tokens [K, D] with row ends [D] among them → [K + R, D]; arguments as for :func:`row_order`."""
    rows: NDArray[Any] = np.concatenate((tokens, end[None]))[row_order(indices, columns)]
    return rows
