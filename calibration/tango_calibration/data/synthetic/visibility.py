"""Which part of each figure is visible."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.synthetic.scene import SIDE, Appearance, Figure, Scene
from tango_calibration.data.synthetic.shapes import mask


def corner(scene: Scene, figure: Figure, appearance: Appearance, at: float) -> tuple[int, int]:
    """The figure's left and top pixel at a time in frames; may be outside the frame."""
    (x, y), (left, top) = appearance.center(at), scene.camera(at)
    return round(x - figure.pixels / 2 - left), round(y - figure.pixels / 2 - top)


def place(scene: Scene, appearance: Appearance, at: float) -> tuple[int, int]:
    """Row and column of the figure's center in a 3×3 grid over the frame."""
    (x, y), (left, top) = appearance.center(at), scene.camera(at)
    return _third(y - top), _third(x - left)


def visible_shares(scenes: Sequence[Scene], figures: Sequence[Figure], frames: int) -> NDArray[np.float32]:
    """How much of each figure is visible in each sampled frame.

    Returns:
        fp32 [figures, F]: the share of its area that is in the frame and not hidden; 0 if it is absent. An area hidden
        by two others counts twice.
    """
    seen = np.zeros((len(figures), frames), np.float32)
    for s, scene in enumerate(scenes):
        here = [(n, f, a) for n, f in enumerate(figures) for a in f.appearances if a.scene == s]
        for i in range(scene.first, scene.last + 1):
            left, top = (round(c) for c in scene.camera(i))
            bars = [(bar.left - left, bar.top - top, bar.right - left, bar.bottom - top) for bar in scene.bars]
            there = [(n, f, *corner(scene, f, a, i)) for n, f, a in here if a.first <= i <= a.last]
            for n, figure, x, y in there:
                front = [(g, u, v) for _, g, u, v in there if g.depth > figure.depth]
                seen[n, i] = _part(figure, x, y, front, bars)
    return seen


def _part(
    figure: Figure,
    x: int,
    y: int,
    front: Sequence[tuple[Figure, int, int]],
    bars: Sequence[tuple[int, int, int, int]],
) -> float:
    """Visible share of a figure at (x, y), behind figures at (u, v) and bars (left, top, right, bottom), in pixels."""
    own = mask(figure.shape, figure.pixels)
    edge = figure.pixels
    area = int(own.sum())
    inside = own[max(0, -y) : max(0, SIDE - y), max(0, -x) : max(0, SIDE - x)]
    left = int(inside.sum())
    for a, b, c, d in bars:
        left -= int(own[max(0, b - y) : max(0, d - y), max(0, a - x) : max(0, c - x)].sum())
    for other, u, v in front:
        du, dv = u - x, v - y
        if -other.pixels < du < edge and -other.pixels < dv < edge:
            cover = mask(other.shape, other.pixels)[max(0, -dv) : edge - dv, max(0, -du) : edge - du]
            rows, columns = cover.shape
            behind = own[max(0, dv) : max(0, dv) + rows, max(0, du) : max(0, du) + columns]
            left -= int((behind.astype(np.uint32) * cover).sum()) >> 8
    return max(0, left) / area


def _third(coordinate: float) -> int:
    return min(2, max(0, int(coordinate * 3 / SIDE)))
