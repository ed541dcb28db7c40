"""Facts about a frame, as numbers and as phrases."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.synthetic import visibility
from tango_calibration.data.synthetic.scene import Figure, Scene
from tango_calibration.data.synthetic.vocabulary import COLORS, PLACES, SHAPES, SIZES, with_article

#: Attributes of a figure in a frame with their values, in the order of a fact.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "color": COLORS,
    "shape": SHAPES,
    "place": PLACES,
}

#: Marks an attribute that a phrase does not mention.
UNSTATED = -1


def facts(
    scenes: Sequence[Scene], figures: Sequence[Figure], visible: NDArray[np.float32], i: int
) -> NDArray[np.int64]:
    """Facts about frame `i`.

    Returns:
        int64 [n, 4], the attributes of each figure that is at least half visible, as indices into `ATTRIBUTES`.
    """
    found = []
    for figure, part in zip(figures, visible, strict=True):
        if part[i] >= 0.5:
            appearance = next(a for a in figure.appearances if a.first <= i <= a.last)
            row, column = visibility.place(scenes[appearance.scene], appearance, i)
            looks = SIZES.index(figure.size), COLORS.index(figure.color), SHAPES.index(figure.shape)
            found.append([*looks, 3 * row + column])
    return np.array(found, np.int64).reshape(-1, len(ATTRIBUTES))


def phrase(fact: Sequence[int]) -> str:
    """A fact [4] in words, without `UNSTATED` attributes: "a small red star at the top left", "a large object"."""
    size, color, shape, place = (
        "" if index == UNSTATED else values[index] for values, index in zip(ATTRIBUTES.values(), fact, strict=True)
    )
    thing = " ".join(word for word in (size, color, shape or "object") if word)
    return f"{with_article(thing)} {place}".strip()
