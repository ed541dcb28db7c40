"""Outlines of figures."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

_SUPERSAMPLING = 3


@cache
def mask(shape: str, pixels: int) -> NDArray[np.uint16]:
    """How much of each pixel a shape covers, 0 to 256.

    Args:
        shape: One of `vocabulary.SHAPES`.
        pixels: Side of the square that it fills.

    Returns:
        uint16 [pixels, pixels], read-only.
    """
    fine = pixels * _SUPERSAMPLING
    axis = (np.arange(fine) + 0.5) / fine * 2 - 1
    inside = _inside(shape, axis[None, :], axis[:, None])
    cells = inside.reshape(pixels, _SUPERSAMPLING, pixels, _SUPERSAMPLING)
    covered: NDArray[np.uint16] = (cells.mean(axis=(1, 3)) * 256).astype(np.uint16)
    covered.flags.writeable = False
    return covered


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points of the square [-1, 1]², with y downward, are inside the shape."""
    if shape == "circle":
        return np.asarray(x**2 + y**2 < 1)
    if shape == "ring":
        return np.asarray((x**2 + y**2 < 1) & (x**2 + y**2 > 0.34))
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) < 0.9)
    if shape == "triangle":
        return np.asarray((np.abs(x) < (y + 1) / 2) & (y < 0.85))
    if shape == "cross":
        return np.asarray((np.minimum(np.abs(x), np.abs(y)) < 0.3) & (np.maximum(np.abs(x), np.abs(y)) < 0.96))
    return _star(x, y)


def _star(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """A five-pointed star: fifths of the circle are folded onto half a point, bounded by a line from tip to notch."""
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    notch = 0.45
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    tip_to_notch = np.array([notch * np.cos(np.pi / 5) - 1, notch * np.sin(np.pi / 5)])
    return np.asarray((along - 1) * tip_to_notch[1] - across * tip_to_notch[0] < 0)
