"""Questions about a clip, or about a single frame of it."""

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.questions import Question
from tango_calibration.data.synthetic import visibility
from tango_calibration.data.synthetic.scene import Figure, Scene
from tango_calibration.data.synthetic.vocabulary import (
    COLORS,
    HELD_OUT,
    NUMBERS,
    QUESTIONS,
    REGIONS,
    SHAPES,
    SIZES,
    TYPES,
    plural,
    with_article,
)

_CLEAR = 0.65  # minimum visible share of a figure that is asked about
_MIN_FRAMES_APART = 2  # between two first appearances that a question compares
_REGIONS = dict(zip([(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)], REGIONS, strict=True))

# Weight of small and brief subjects, relative to others.
_PREFERENCE = 2.0
# Weights of the types. Types that fewer clips support have a higher weight.
_DEMAND = {
    "color": 1.0,
    "shape": 1.0,
    "count": 1.5,
    "where": 2.0,
    "direction": 2.4,
    "first": 1.2,
    "appear": 0.7,
    "times": 2.0,
    "larger": 1.3,
}


@dataclass(frozen=True)
class _Candidate:
    """A question without its text."""

    type: str
    names: tuple[str, ...]
    answer: str
    subjects: tuple[Figure, ...]

    @property
    def weight(self) -> float:
        hard = any(figure.size == "small" or len(figure.frames) <= 2 for figure in self.subjects)
        return _PREFERENCE if hard else 1.0


def questions(
    scenes: Sequence[Scene],
    figures: Sequence[Figure],
    visible: NDArray[np.float32],
    held_out: bool,
    rng: np.random.Generator,
    count: int,
) -> list[Question]:
    """Up to `count` different questions, each type once before any type twice.

    Args:
        visible: fp32 [figures, F], the result of `visibility.visible_shares`.
        held_out: Whether the pairs of `vocabulary.HELD_OUT` may be mentioned.
    """
    left = _candidates(scenes, figures, visible, held_out)
    left["appear"] = _balanced(left["appear"], rng)
    asked: list[Question] = []
    while len(asked) < count and any(left.values()):
        present = [kind for kind in TYPES if left[kind]]
        demand = np.array([_DEMAND[kind] for kind in present])
        order = rng.choice(len(present), len(present), replace=False, p=demand / demand.sum())
        for kind in [present[i] for i in order][: count - len(asked)]:
            candidate = _draw(left[kind], rng)
            left[kind].remove(candidate)
            asked.append(_with_text(candidate, rng))
    return asked


def frame_questions(
    scenes: Sequence[Scene],
    figures: Sequence[Figure],
    visible: NDArray[np.float32],
    i: int,
    held_out: bool,
    rng: np.random.Generator,
    count: int,
) -> list[Question]:
    """As :func:`questions`, about the figures in frame `i`, without questions about time.

    In a single frame everything is brief, so every question has that tag and all subjects have the same weight.
    """
    seen = [n for n, part in enumerate(visible) if part[i] > 0]
    return questions(scenes, [_in_frame(figures[n], i) for n in seen], visible[seen], held_out, rng, count)


def _in_frame(figure: Figure, i: int) -> Figure:
    """The part of a figure that is in frame `i`."""
    now = next(a for a in figure.appearances if a.first <= i <= a.last)
    still = replace(now, first=i, last=i, start=now.center(i), end=now.center(i))
    return replace(figure, role="counted" if figure.role == "counted" else "static", appearances=(still,))


def _balanced(candidates: Sequence[_Candidate], rng: np.random.Generator) -> list[_Candidate]:
    """As many questions with the answer yes as with no, in random order."""
    halves = [[c for c in candidates if c.answer == answer] for answer in ("yes", "no")]
    fewer = min(map(len, halves))
    return [half[i] for half in halves for i in rng.permutation(len(half))[:fewer]]


def _draw(candidates: Sequence[_Candidate], rng: np.random.Generator) -> _Candidate:
    if candidates[0].type == "appear":  # questions with the answer no have no subjects, whose weights would count
        wanted = "yes" if rng.random() < 0.5 else "no"
        candidates = [c for c in candidates if c.answer == wanted] or candidates
    weights = np.cumsum([c.weight for c in candidates])
    return candidates[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]


def _with_text(candidate: _Candidate, rng: np.random.Generator) -> Question:
    names = candidate.names if len(candidate.names) == 1 or rng.random() < 0.5 else candidate.names[::-1]
    templates = QUESTIONS[candidate.type]
    template = templates[rng.integers(len(templates))]
    text = template.format(**dict(zip("ab", names, strict=False)))
    return Question(candidate.type, text, candidate.answer, tags=_tags(candidate))


def _tags(candidate: _Candidate) -> tuple[str, ...]:
    subjects = candidate.subjects
    tags = [size for size in SIZES if any(figure.size == size for figure in subjects)]
    tags += ["brief"] * any(len(figure.frames) <= 2 for figure in subjects)
    tags += [role for role in ("moving", "blinking") if any(figure.role == role for figure in subjects)]
    mentioned = {candidate.names[0]} if candidate.answer == "no" else {with_article(figure.name) for figure in subjects}
    tags += ["held-out"] * any(with_article(" ".join(pair)) in mentioned for pair in HELD_OUT)
    return tuple(tags)


def _candidates(
    scenes: Sequence[Scene], figures: Sequence[Figure], visible: NDArray[np.float32], held_out: bool
) -> dict[str, list[_Candidate]]:
    """All questions that the clip supports, by type."""
    found: dict[str, list[_Candidate]] = {kind: [] for kind in TYPES}

    def add(kind: str, names: tuple[str, ...], answer: str, *subjects: Figure) -> None:
        found[kind].append(_Candidate(kind, names, answer, subjects))

    clear = [f for f, part in zip(figures, visible, strict=True) if _is_clear(f, part)]
    pairs = Counter(figure.name for figure in figures)
    single = [figure for figure in clear if pairs[figure.name] == 1]

    for figure in single:
        if by_shape := _unique_name(figure, [f for f in figures if f.shape == figure.shape], figure.shape):
            add("color", (by_shape,), figure.color, figure)
        if by_color := _unique_name(figure, [f for f in figures if f.color == figure.color], f"{figure.color} object"):
            add("shape", (by_color,), figure.shape, figure)
        appearance = figure.appearances[0]
        if figure.role in ("static", "brief", "counted") and not any(scenes[appearance.scene].pan):
            field = visibility.place(scenes[appearance.scene], appearance, appearance.first)
            if field in _REGIONS:
                add("where", (figure.name,), _REGIONS[field], figure)
        if figure.direction:
            add("direction", (figure.name,), figure.direction, figure)
        if figure.role == "blinking":
            add("times", (figure.name,), NUMBERS[len(figure.appearances) - 1], figure)

    for a, b in combinations(single, 2):
        if abs(a.frames[0] - b.frames[0]) >= _MIN_FRAMES_APART:
            add("first", (a.name, b.name), min(a, b, key=lambda f: f.frames[0]).name, a, b)
        if a.size != b.size:
            add("larger", (a.name, b.name), max(a, b, key=lambda f: f.pixels).name, a, b)

    counted = [figure for figure in figures if figure.role == "counted"]
    if counted and all(figure in clear for figure in counted):
        add("count", (plural(counted[0].shape),), NUMBERS[len(counted) - 1], *counted)

    for figure in {f.name: f for f in clear}.values():
        add("appear", (with_article(figure.name),), "yes", figure)
    for name in _absent_names(clear, pairs, held_out):
        add("appear", (with_article(name),), "no")
    return found


def _absent_names(clear: Sequence[Figure], known: Container[str], held_out: bool) -> list[str]:
    """Pairs that the clip does not have, of a color and a shape that it has; without such pairs, of one of the two."""
    colors, shapes = {f.color for f in clear}, {f.shape for f in clear}
    half: list[str] = []
    whole: list[str] = []
    for color, shape in product(COLORS, SHAPES):
        matches = (color in colors) + (shape in shapes)
        if matches and f"{color} {shape}" not in known and (held_out or (color, shape) not in HELD_OUT):
            (whole if matches == 2 else half).append(f"{color} {shape}")
    return whole or half


def _is_clear(figure: Figure, part: NDArray[np.float32]) -> bool:
    """Whether it is clearly visible: in all frames if it is brief, else when it appears and in most frames."""
    well = part[figure.frames] >= _CLEAR
    if figure.role in ("static", "moving"):
        return bool(well[0] and well.mean() >= 0.6)
    return bool(well.all())


def _unique_name(figure: Figure, alike: Sequence[Figure], name: str) -> str | None:
    """A name that fits this figure alone, with its size if necessary; None if there is none."""
    if len(alike) == 1:
        return name
    return f"{figure.size} {name}" if [f.size for f in alike].count(figure.size) == 1 else None
