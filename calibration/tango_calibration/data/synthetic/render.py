"""Renders scenes and figures.

Colors keep a distance of `_MARGIN` from 0 and 255, so that adding noise and flicker cannot overflow.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.synthetic.scene import SIDE, Appearance, Figure, Scene
from tango_calibration.data.synthetic.shapes import mask
from tango_calibration.data.synthetic.visibility import corner

Image = NDArray[np.uint8]

PALETTE = {
    "red": (215, 35, 40),
    "green": (35, 165, 55),
    "blue": (40, 75, 225),
    "yellow": (235, 215, 40),
    "orange": (235, 125, 25),
    "purple": (150, 45, 190),
    "cyan": (40, 205, 220),
    "white": (235, 235, 235),
}
_GROUNDS = {"gray": (108, 108, 108), "brown": (118, 96, 72), "dark": (58, 56, 60), "slate": (86, 100, 118)}

_MARGIN = 17
_NOISE_STD, _MAX_NOISE, _MAX_FLICKER = 4.0, 14, 3
_OFFSETS = 1 << 20  # possible offsets of a frame's noise in the noise bank


def render(scenes: Sequence[Scene], figures: Sequence[Figure], times: NDArray[np.float64], key: int) -> Image:
    """Renders a clip at some times.

    Args:
        times: Times in sampled frames: 0 is the first frame, 0.5 half an interval later.
        key: Noise and flicker depend on it and on the time.

    Returns:
        uint8 [len(times), SIDE, SIDE, 3], RGB.
    """
    frames = np.empty((len(times), SIDE, SIDE, 3), np.uint8)
    number = np.searchsorted([scene.first - 0.5 for scene in scenes], times, side="right") - 1
    for s in np.unique(number):
        _draw_scene(frames, np.flatnonzero(number == s), times, scenes[s], _figures_of(figures, int(s)))
    offsets, flicker = _random_by_time(times, key)
    bank = _noise_bank()
    for frame, offset, change in zip(frames, offsets, flicker, strict=True):
        frame += bank[offset : offset + frame.size].reshape(frame.shape)
        frame += change
    return frames


def _figures_of(figures: Sequence[Figure], scene: int) -> list[tuple[Figure, Appearance]]:
    """Figures of a scene, from back to front."""
    here = [(figure, appearance) for figure in figures for appearance in figure.appearances]
    return sorted((f for f in here if f[1].scene == scene), key=lambda f: f[0].depth)


def _draw_scene(
    frames: Image,
    which: NDArray[np.intp],
    times: NDArray[np.float64],
    scene: Scene,
    figures: Sequence[tuple[Figure, Appearance]],
) -> None:
    canvas = background(scene)
    sprites = {id(figure): _sprite(figure, scene.seed) for figure, _ in figures}
    for i in which:
        at = float(times[i])
        left, top = (round(c) for c in scene.camera(at))
        frames[i] = canvas[top : top + SIDE, left : left + SIDE]
        for figure, appearance in figures:
            if appearance.first - 0.5 <= at < appearance.last + 0.5:
                _blend(frames[i], *sprites[id(figure)], *corner(scene, figure, appearance, at))
        for bar in scene.bars:
            x, y = max(0, bar.left - left), max(0, bar.top - top)
            frames[i, y : max(0, bar.bottom - top), x : max(0, bar.right - left)] = bar.gray


def _blend(frame: Image, cover: NDArray[np.uint16], paint: NDArray[np.uint16], x: int, y: int) -> None:
    """Blends a sprite into a frame; parts of it may be outside."""
    edge = len(cover)
    top, bottom, left, right = max(0, y), min(SIDE, y + edge), max(0, x), min(SIDE, x + edge)
    if top >= bottom or left >= right:
        return
    part = np.s_[top - y : bottom - y, 3 * (left - x) : 3 * (right - x)]
    rows = frame.reshape(SIDE, 3 * SIDE)[top:bottom, 3 * left : 3 * right]
    mixed = rows * cover[part]
    mixed += paint[part]
    mixed >>= 8
    rows[:] = mixed


def _sprite(figure: Figure, seed: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """A figure ready to be blended: 256 minus its coverage, and its color times its coverage.

    Both are uint16 [pixels, 3 · pixels]. The color is shaded from the top left and slightly mottled.
    """
    edge = figure.pixels
    covered = np.repeat(mask(figure.shape, edge), 3, axis=1)
    slope = np.linspace(0.06, -0.06, edge, dtype=np.float32)
    bank = _clouds()
    row, column = (seed + edge) % (len(bank) - edge), (seed // 7) % (len(bank) - edge)
    mottle = bank[row : row + edge, column : column + edge] * np.float32(0.16 / 255)
    light = 0.94 + slope[:, None] + slope[None, :] + mottle
    color = np.array(PALETTE[figure.color], np.float32)
    paint = np.clip(light[:, :, None] * color, _MARGIN, 255 - _MARGIN).astype(np.uint16).reshape(edge, 3 * edge)
    return 256 - covered, paint * covered + 128


def background(scene: Scene) -> Image:
    """The background of a scene, as large as its pan needs: uint8 [SIDE + |pan|, SIDE + |pan|, 3]."""
    rng = np.random.default_rng(scene.seed)
    shape = SIDE + abs(scene.pan[1]), SIDE + abs(scene.pan[0])
    tone = np.array(_GROUNDS[scene.tone], np.float32) * rng.uniform(0.92, 1.08)
    if scene.pattern in ("plain", "cluttered"):
        canvas: Image = np.empty((*shape, 3), np.uint8)
        canvas[:] = tone.astype(np.uint8)
        if scene.pattern == "cluttered":
            _clutter(canvas, rng)
        return canvas
    contrast = rng.uniform(0.16, 0.28)
    steps = np.linspace(1 - contrast, 1 + contrast, 256, dtype=np.float32)
    shades = np.clip(tone * steps[:, None], _MARGIN, 165).astype(np.uint8)
    return np.take(shades, _LEVELS[scene.pattern](rng, *shape), axis=0)


def _shaded(rng: np.random.Generator, height: int, width: int) -> Image:
    angle = rng.uniform(0, 2 * np.pi)
    ramp = _ramp(height, width, np.cos(angle), np.sin(angle))
    return _bytes((ramp - ramp.min()) * (255 / np.ptp(ramp)))


def _striped(rng: np.random.Generator, height: int, width: int) -> Image:
    angle, period = rng.integers(4) * np.pi / 4, rng.uniform(28, 64)
    return (_ramp(height, width, np.cos(angle) / period, np.sin(angle) / period) % 1 < 0.5).astype(np.uint8) * 255


def _checkered(rng: np.random.Generator, height: int, width: int) -> Image:
    cell = int(rng.integers(24, 57))
    rows, columns = np.arange(height) // cell, np.arange(width) // cell
    return ((rows[:, None] + columns[None, :]) % 2).astype(np.uint8) * 255


def _cloudy(rng: np.random.Generator, height: int, width: int) -> Image:
    bank = _clouds()
    row, column = rng.integers(len(bank) - height + 1), rng.integers(len(bank) - width + 1)
    flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
    return bank[row : row + height, column : column + width][flip]


_LEVELS = {"shaded": _shaded, "striped": _striped, "checkered": _checkered, "cloudy": _cloudy}


def _ramp(height: int, width: int, x: float, y: float) -> NDArray[np.float32]:
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    return rows[:, None] * np.float32(y) + columns[None, :] * np.float32(x)


def _clutter(canvas: Image, rng: np.random.Generator) -> None:
    """Scatters dull specks over a background."""
    specks = _specks()
    number = canvas.shape[0] * canvas.shape[1] // 600
    kinds = rng.integers(len(specks), size=number)
    rows, columns = (rng.integers(0, length - 30, number) for length in canvas.shape[:2])
    grays = rng.uniform(40, 150, (number, 1)).astype(np.float32)
    warmth = rng.uniform(0, 0.18, (number, 1)) * np.array([1.0, 0.0, -1.0])  # from gray to brown
    colors = np.clip(grays * (1 + warmth), _MARGIN, 165).astype(np.uint8)
    for kind, row, column, color in zip(kinds, rows, columns, colors, strict=True):
        speck = specks[kind]
        canvas[row : row + len(speck), column : column + len(speck)][speck] = color


@lru_cache(maxsize=1)
def _specks() -> list[NDArray[np.bool_]]:
    """Irregular convex polygons of 5 to 24 pixels."""
    rng = np.random.default_rng(1)
    specks: list[NDArray[np.bool_]] = []
    for _ in range(64):
        edge = int(rng.integers(5, 25))
        axis = (np.arange(edge) + 0.5) / edge * 2 - 1
        sides = rng.integers(3, 7)
        angles = (np.arange(sides) + rng.uniform(0, 0.7, sides)) * (2 * np.pi / sides) + rng.uniform(0, 2 * np.pi)
        reach = rng.uniform(0.35, 0.8, sides)
        inside = np.ones((edge, edge), bool)
        for angle, distance in zip(angles, reach, strict=True):
            inside &= axis[None, :] * np.cos(angle) + axis[:, None] * np.sin(angle) < distance
        specks.append(inside)
    return specks


@lru_cache(maxsize=1)
def _clouds() -> Image:
    """Smooth noise of three octaves, uint8 [512, 512]."""
    rng = np.random.default_rng(2)
    size = 512
    total = np.zeros((size, size), np.float32)
    for cells, weight in ((6, 1.0), (14, 0.5), (40, 0.25)):
        knots = rng.standard_normal((cells + 1, cells + 1)).astype(np.float32)
        at = np.linspace(0, cells - 1e-3, size)
        low = at.astype(int)
        t = at - low
        t = (t * t * (3 - 2 * t)).astype(np.float32)
        rows = knots[low] * (1 - t)[:, None] + knots[low + 1] * t[:, None]
        total += weight * (rows[:, low] * (1 - t) + rows[:, low + 1] * t)
    low_end, high_end = np.percentile(total, (1, 99))
    return _bytes(np.clip((total - low_end) / (high_end - low_end), 0, 1) * 255)


@lru_cache(maxsize=1)
def _noise_bank() -> Image:
    """Sensor noise in two's complement: added to a byte, it wraps to the correct sum."""
    noise = np.random.default_rng(3).standard_normal(_OFFSETS + SIDE * SIDE * 3, np.float32) * np.float32(_NOISE_STD)
    signed: NDArray[np.int8] = np.rint(noise).clip(-_MAX_NOISE, _MAX_NOISE).astype(np.int8)
    return signed.view(np.uint8)


def _bytes(values: NDArray[np.floating]) -> Image:
    rounded: Image = values.astype(np.uint8)
    return rounded


def _random_by_time(times: NDArray[np.float64], key: int) -> tuple[NDArray[np.int64], Image]:
    """Offsets into the noise bank and changes of brightness, which depend only on time and key."""
    mixed = np.rint(times * 1024).astype(np.int64).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(29)
    change = (mixed >> np.uint64(40)) % np.uint64(2 * _MAX_FLICKER + 1)
    return (mixed % np.uint64(_OFFSETS)).astype(np.int64), (change.astype(np.int8) - _MAX_FLICKER).view(np.uint8)
