"""What is seen in a frame, as numbers and in words."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.synthetic import sight
from tango_calibration.data.synthetic.scene import Figure, Scene
from tango_calibration.data.synthetic.words import COLOURS, PLACES, SHAPES, SIZES, with_article

#: What can be said of a figure in a frame, and the values it can take, in the order of a fact.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "place": PLACES,
}

#: Stands for an attribute of which nothing is said.
UNSAID = -1


def facts(scenes: Sequence[Scene], figures: Sequence[Figure], shown: NDArray[np.float32], i: int) -> NDArray[np.int64]:
    """What is seen in frame `i`.

    Returns:
        [n, 4], the attributes of each figure of which at least half is seen, as indices into `ATTRIBUTES`.
    """
    found = []
    for figure, part in zip(figures, shown, strict=True):
        if part[i] >= 0.5:
            appearance = next(a for a in figure.appearances if a.first <= i <= a.last)
            row, column = sight.place(scenes[appearance.scene], appearance, i)
            looks = SIZES.index(figure.size), COLOURS.index(figure.colour), SHAPES.index(figure.shape)
            found.append([*looks, 3 * row + column])
    return np.array(found, np.int64).reshape(-1, len(ATTRIBUTES))


def phrase(fact: Sequence[int]) -> str:
    """A fact [4] in words; what is `UNSAID` is left out: "a small red star at the top left", "a large object"."""
    size, colour, shape, place = (
        "" if index == UNSAID else values[index] for values, index in zip(ATTRIBUTES.values(), fact, strict=True)
    )
    thing = " ".join(word for word in (size, colour, shape or "object") if word)
    return f"{with_article(thing)} {place}".strip()
