"""Features and salience of the newest steps of frames, on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class HostFeatureRing:
    """See :class:`tango_runtime.backends.base.FeatureRing`.

    Args:
        steps: Steps that it has room for.
    """

    def __init__(self, steps: int) -> None:
        self.held = 0
        self._room, self._next = steps, 0
        self._tensors: list[NDArray[Any]] = []

    def append(self, features: NDArray[Any], salience: NDArray[Any]) -> None:
        """Adds steps, features [T, L, D] and salience [T, L]; where there is no room, they replace the oldest."""
        if not self._tensors:
            self._tensors = [np.zeros((self._room, *new.shape[1:]), new.dtype) for new in (features, salience)]
        places = (self._next + np.arange(len(features))[-self._room :]) % self._room
        for tensor, new in zip(self._tensors, (features, salience), strict=True):
            tensor[places] = new[-self._room :]
        self._next = (self._next + min(len(features), self._room)) % self._room
        self.held = min(self.held + len(features), self._room)

    def newest(self, steps: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The newest ``steps`` steps, oldest first."""
        begin = (self._next - steps) % self._room
        if begin + steps <= self._room:
            features, salience = (tensor[begin : begin + steps] for tensor in self._tensors)
            return features, salience.copy()  # it is kept for the report of an answer
        features, salience = (np.concatenate((t[begin:], t[: begin + steps - self._room])) for t in self._tensors)
        return features, salience

    def clear(self) -> None:
        """Forgets all steps."""
        self._tensors, self.held, self._next = [], 0, 0
