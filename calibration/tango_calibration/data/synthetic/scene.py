"""Scenes and figures of a clip, drawn at random."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from tango_calibration.data.synthetic.vocabulary import COLORS, DIRECTIONS, HELD_OUT, PATTERNS, SHAPES, TONES

SIDE = 384  # height and width of a frame in pixels

#: Range of the side of a figure's square, by size. A small one is slightly larger than a token, which has 27 pixels.
PIXELS = {"small": (30, 38), "medium": (60, 76), "large": (110, 140)}

Role = Literal["static", "moving", "brief", "blinking", "counted"]
Point = tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """A thin bar in front of everything, in pixels of the scene's background."""

    left: int
    top: int
    right: int
    bottom: int
    gray: int


@dataclass(frozen=True)
class Scene:
    """Frames `first` to `last` between two cuts.

    Attributes:
        pattern: One of `vocabulary.PATTERNS`.
        tone: One of `vocabulary.TONES`.
        seed: Seed of the background's details.
        pan: Pixels that the camera moves during the scene, to the right and downward; (0, 0) if it does not move.
    """

    first: int
    last: int
    pattern: str
    tone: str
    seed: int
    pan: tuple[int, int]
    bars: tuple[Bar, ...]

    def camera(self, at: float) -> Point:
        """The frame's top left corner on the background, at a time in frames."""
        progress = (at - self.first + 0.5) / (self.last - self.first + 1)
        return self.pan[0] * progress + max(0, -self.pan[0]), self.pan[1] * progress + max(0, -self.pan[1])


@dataclass(frozen=True)
class Appearance:
    """A figure in frames `first` to `last` of a scene; its center moves from `start` to `end` on the background."""

    scene: int
    first: int
    last: int
    start: Point
    end: Point

    def center(self, at: float) -> Point:
        """Its center on the background at a time in frames."""
        progress = (at - self.first) / max(1, self.last - self.first)
        return tuple(a + (b - a) * progress for a, b in zip(self.start, self.end, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Figure:
    """A colored shape with its appearances.

    Attributes:
        pixels: Side of the square that it fills.
        depth: Figures with a greater depth are in front.
    """

    color: str
    shape: str
    size: str
    pixels: int
    role: Role
    depth: float
    appearances: tuple[Appearance, ...]

    @property
    def name(self) -> str:
        """Color and shape."""
        return f"{self.color} {self.shape}"

    @property
    def frames(self) -> list[int]:
        """Sampled frames with the figure, hidden or not."""
        return [i for appearance in self.appearances for i in range(appearance.first, appearance.last + 1)]

    @property
    def direction(self) -> str | None:
        """Direction of its movement; None if it does not move."""
        (x, y), (to_x, to_y) = self.appearances[0].start, self.appearances[0].end
        if x == to_x and y == to_y:
            return None
        return ("left" if to_x < x else "right") if x != to_x else ("up" if to_y < y else "down")


def compose(rng: np.random.Generator, frames: int, held_out: bool) -> tuple[tuple[Scene, ...], tuple[Figure, ...]]:
    """Draws the scenes and figures of a clip.

    Args:
        frames: Number of frames F, at least 8.
        held_out: Whether the pairs of `vocabulary.HELD_OUT` may appear.

    Returns:
        (the scenes in order, the figures in order of appearance).
    """
    scenes = _scenes(rng, frames)
    cast = _Cast(rng, scenes, frames, held_out)
    order = rng.permutation(len(scenes))
    still = [int(s) for s in order if scenes[s].pan == (0, 0)]
    # First the figures that most types of question need, then as many others as there is room for.
    if rng.random() < (0.75 if len(scenes) > 1 else 0.4):  # they take most of the room of a single scene
        cast.counted(int(order[0]))
    if rng.random() < 0.85:
        cast.blinking()
    if still and cast.room[still[-1]] > 0 and rng.random() < 0.9:
        cast.moving(still[-1])
    if cast.room[order[-1]] > 0 and rng.random() < 0.6:
        cast.brief(int(order[-1]))
    for scene in order:
        if cast.room[scene] > 0 and not cast.lasts(int(scene)):
            cast.static(int(scene))
        while cast.room[scene] > 0:
            role = rng.random()
            if role < 0.2 and scene in still:
                cast.moving(int(scene))
            elif role < 0.45:
                cast.brief(int(scene))
            else:
                cast.static(int(scene))
    return scenes, tuple(sorted(cast.figures, key=lambda figure: figure.frames[0]))


def _scenes(rng: np.random.Generator, frames: int) -> tuple[Scene, ...]:
    lowest, highest, shortest = (1, 2, 3) if frames < 16 else (1, 3, 4) if frames == 16 else (2, 4, 5)
    number = int(rng.integers(lowest, highest + 1))
    spare = frames - number * shortest
    cuts = np.sort(rng.integers(0, spare + 1, number - 1)) + shortest * np.arange(1, number)
    edges = [0, *cuts.tolist(), frames]
    scenes: list[Scene] = []
    for first, after in pairwise(edges):
        # Another pattern than before, so that the cut is visible.
        others = [pattern for pattern in PATTERNS if not scenes or pattern != scenes[-1].pattern]
        scenes.append(_scene(rng, first, after - 1, others[rng.integers(len(others))]))
    return tuple(scenes)


def _scene(rng: np.random.Generator, first: int, last: int, pattern: str) -> Scene:
    pan = (0, 0)
    if rng.random() < 0.4:
        travel = [int(rng.integers(50, 111)) * (1 if rng.random() < 0.5 else -1) for _ in range(2)]
        kind = rng.integers(3)
        pan = (travel[0] if kind != 1 else 0, travel[1] if kind != 0 else 0)
    bars = tuple(_bar(rng, pan) for _ in range(int(rng.integers(1, 3)))) if rng.random() < 0.25 else ()
    tone = TONES[rng.integers(len(TONES))]
    return Scene(first, last, pattern, tone, int(rng.integers(1 << 31)), pan, bars)


def _bar(rng: np.random.Generator, pan: tuple[int, int]) -> Bar:
    width, height = SIDE + abs(pan[0]), SIDE + abs(pan[1])
    thick, gray = int(rng.integers(10, 20)), int(rng.integers(140, 166) if rng.random() < 0.5 else rng.integers(30, 50))
    if rng.random() < 0.5:
        left = int(rng.integers(60, width - 60))
        return Bar(left, 0, left + thick, height, gray)
    top = int(rng.integers(60, height - 60))
    return Bar(0, top, width, top + thick, gray)


class _Cast:
    """Draws figures, each at its own place."""

    def __init__(self, rng: np.random.Generator, scenes: Sequence[Scene], frames: int, held_out: bool) -> None:
        self.rng, self.scenes, self.frames, self.held_out = rng, scenes, frames, held_out
        self.figures: list[Figure] = []
        most = 4 if len(scenes) < 3 else 3
        self.room = [int(rng.integers(2, most + 1)) for _ in scenes]
        self.taken: list[list[tuple[float, float, float]]] = [[] for _ in scenes]  # center and half the side
        self.counted_shape = ""

    def lasts(self, scene: int) -> bool:
        """Whether a figure is present for most of a scene."""
        length = self.scenes[scene].last - self.scenes[scene].first + 1
        stays = [a for figure in self.figures for a in figure.appearances if a.scene == scene]
        return any(a.last - a.first + 1 > length / 2 for a in stays)

    def static(self, scene: int) -> None:
        """A figure that does not move, for the scene or a large part of it."""
        self._add_static(scene, "static", self._size((0.35, 0.35, 0.3)), *self._part(scene))

    def brief(self, scene: int) -> None:
        """A figure that is present in one or two frames."""
        self._add_static(scene, "brief", self._size((0.4, 0.35, 0.25)), *self._moment(scene))

    def counted(self, scene: int) -> None:
        """One to four figures at the same time, of a shape that no other figure of the clip has."""
        number = int(self.rng.integers(1, 5))
        size = self._size((0.5, 0.5, 0.0))
        first, last = self._moment(scene) if self.rng.random() < 0.25 else self._part(scene)
        same_color = self.rng.random() < 0.4
        self.room[scene] = max(self.room[scene], number)
        color, shape = self._pair({scene})
        for i in range(number):
            if i and not same_color:
                color, shape = self._pair({scene}, shape=shape)
            self._add_static(scene, "counted", size, first, last, (color, shape))
        self.counted_shape = shape

    def moving(self, scene: int) -> None:
        """A figure that crosses at least two fifths of the frame."""
        first, last = self._part(scene)
        size = self._size((0.3, 0.45, 0.25))
        pixels = self._pixels(size)
        low, high = pixels / 2 + 4, SIDE - pixels / 2 - 4
        travel = self.rng.uniform(0.42 * SIDE, high - low)
        begin = self.rng.uniform(low, high - travel)
        across = self.rng.uniform(low, high)
        direction = DIRECTIONS[self.rng.integers(4)]
        ends = (begin, begin + travel) if direction in ("right", "down") else (begin + travel, begin)
        start, end = ((e, across) if direction in ("left", "right") else (across, e) for e in ends)
        appearance = Appearance(scene, first, last, start, end)
        self.room[scene] -= 1
        self._add(self._pair({scene}, moving=True), size, pixels, "moving", (appearance,))

    def blinking(self) -> None:
        """A figure that appears one to three separate times, in one scene or over the clip."""
        times = int(self.rng.integers(1, 4))
        spans = [(s.first, s.last) for s in self.scenes if s.last - s.first + 1 >= 3 * times - 2]
        if not spans or self.rng.random() < 0.5:
            spans = [(0, self.frames - 1)]
        windows = self._windows(times, *spans[self.rng.integers(len(spans))])
        size = self._size((0.4, 0.35, 0.25))
        pixels = self._pixels(size)
        places: dict[int, Point] = {}
        same_place = self.rng.random() < 0.5
        appearances = []
        for first, last in windows:
            scene = next(i for i, s in enumerate(self.scenes) if s.first <= first <= s.last)
            place = places[scene] if same_place and scene in places else self._place(scene, pixels)
            if place is None or self.room[scene] < 1:
                return
            places[scene] = place
            appearances.append(Appearance(scene, first, last, place, place))
        for scene in places:
            self.room[scene] -= 1
        self._add(self._pair(set(places)), size, pixels, "blinking", tuple(appearances))

    def _windows(self, times: int, low: int, high: int) -> list[tuple[int, int]]:
        """Frames of separate appearances: one to three each, at least two between them, none across a cut."""
        starts = {s.first for s in self.scenes}
        for longest in (3, 3, 3, 2, 2, 1):
            lengths = self.rng.integers(1, longest + 1, times)
            spare = high - low + 1 - int(lengths.sum()) - 2 * (times - 1)
            if spare < 0:
                continue
            before = np.sort(self.rng.integers(0, spare + 1, times)) + 2 * np.arange(times)
            firsts = low + before + np.cumsum(lengths) - lengths
            windows = [(int(f), int(f + n - 1)) for f, n in zip(firsts, lengths, strict=True)]
            if not any(starts & set(range(first + 1, last + 1)) for first, last in windows):
                return windows
        raise AssertionError("single frames always fit")

    def _add_static(
        self, scene: int, role: Role, size: str, first: int, last: int, pair: tuple[str, str] | None = None
    ) -> None:
        """Adds a figure that does not move, unless the scene is full."""
        self.room[scene] -= 1
        pixels = self._pixels(size)
        place = self._place(scene, pixels)
        if place is not None:
            pair = pair or self._pair({scene})
            self._add(pair, size, pixels, role, (Appearance(scene, first, last, place, place),))

    def _add(
        self, pair: tuple[str, str], size: str, pixels: int, role: Role, appearances: tuple[Appearance, ...]
    ) -> None:
        # Small and short-lived figures are in front, so that no moving figure hides them.
        in_front = size == "small" or role in ("brief", "blinking", "counted")
        depth = float(self.rng.random()) + (1 if in_front else 0)
        self.figures.append(Figure(*pair, size, pixels, role, depth, appearances))

    def _pair(self, scenes: set[int], moving: bool = False, shape: str = "") -> tuple[str, str]:
        """A color and a shape that the clip does not have yet, for a figure of some scenes.

        Figures that may pass each other have different colors, so that they do not look like one.
        """
        known = {(figure.color, figure.shape) for figure in self.figures}
        others = [f for f in self.figures if scenes & {a.scene for a in f.appearances}]
        passing = {figure.color for figure in others if moving or figure.role == "moving"}
        while True:
            if self.held_out and not shape and self.rng.random() < 0.1:
                pair = HELD_OUT[self.rng.integers(len(HELD_OUT))]
            else:
                pair = COLORS[self.rng.integers(len(COLORS))], shape or SHAPES[self.rng.integers(len(SHAPES))]
            if pair in known or pair[0] in passing or pair[1] == self.counted_shape:
                continue
            if self.held_out or pair not in HELD_OUT:
                return pair

    def _size(self, chances: tuple[float, float, float]) -> str:
        return tuple(PIXELS)[int(np.searchsorted(np.cumsum(chances), self.rng.random() * 0.9999))]

    def _pixels(self, size: str) -> int:
        low, high = PIXELS[size]
        return int(self.rng.integers(low, high + 1))

    def _part(self, scene: int) -> tuple[int, int]:
        """The scene's frames, or at least three of them."""
        first, last = self.scenes[scene].first, self.scenes[scene].last
        if self.rng.random() < 0.5 or last - first < 3:
            return first, last
        length = int(self.rng.integers(max(3, (last - first + 1) // 3), last - first + 1))
        begin = int(self.rng.integers(first, last - length + 2))
        return begin, begin + length - 1

    def _moment(self, scene: int) -> tuple[int, int]:
        """One or two frames of the scene."""
        length = int(self.rng.integers(1, 3))
        first = int(self.rng.integers(self.scenes[scene].first, self.scenes[scene].last - length + 2))
        return first, first + length - 1

    def _place(self, scene: int, pixels: int) -> Point | None:
        """A free place on a scene's background that stays inside the frame; None if none was found."""
        half, pan = pixels / 2, self.scenes[scene].pan
        for _ in range(30):
            x, y = self._anywhere(half, pan) if any(pan) else self._in_a_region(half)
            free = all(max(abs(x - u), abs(y - v)) > half + other + 12 for u, v, other in self.taken[scene])
            if free and all(_clear_of(bar, x, y, half) for bar in self.scenes[scene].bars):
                self.taken[scene].append((x, y, half))
                return x, y
        return None

    def _anywhere(self, half: float, pan: tuple[int, int]) -> Point:
        x, y = (self.rng.uniform(abs(p) + half + 4, SIDE - half - 4) for p in pan)
        return x, y

    def _in_a_region(self, half: float) -> Point:
        """A place in a corner, in the center, or sometimes at the middle of an edge."""
        region = self.rng.integers(14)
        column, row = ((0, 2, 0, 2, 1)[region % 5], (0, 0, 2, 2, 1)[region % 5]) if region < 10 else _EDGES[region - 10]
        return self._coordinate(column, half), self._coordinate(row, half)

    def _coordinate(self, third: int, half: float) -> float:
        if third == 1:
            return self.rng.uniform(SIDE / 2 - 24, SIDE / 2 + 24)
        near = self.rng.uniform(half + 4, 108)
        return near if third == 0 else SIDE - near


_EDGES = ((1, 0), (0, 1), (2, 1), (1, 2))


def _clear_of(bar: Bar, x: float, y: float, half: float) -> bool:
    """Whether a bar hides no more than a fifth of a square."""
    wide = min(bar.right, x + half) - max(bar.left, x - half)
    high = min(bar.bottom, y + half) - max(bar.top, y - half)
    return max(0.0, wide) * max(0.0, high) < 0.2 * (2 * half) ** 2
