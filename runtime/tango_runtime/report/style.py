"""What the page and the contact sheet share: kinds of tokens, their colors, and how figures are written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Kinds of tokens, the values of :attr:`tango_runtime.report.report.Report.kind`.
REST, SALIENT, MERGED = 0, 1, 2

#: Orange and blue are distinct under every common form of color blindness; merged tokens also have a dot.
#: report.html.jinja has the same two.
SALIENT_RGB, MERGED_RGB = (255, 176, 0), (64, 156, 255)


def cells(mask: NDArray[np.bool_], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(row, column) of every True in a frame's mask, bool [L]."""
    rows, columns = np.nonzero(mask.reshape(grid))
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def duration(ms: float) -> str:
    """Milliseconds as text: ``8.4 ms``, ``412 ms``, ``12.3 s``."""
    if ms >= 10_000:
        return f"{ms / 1000:,.1f} s"
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.1f} ms"
