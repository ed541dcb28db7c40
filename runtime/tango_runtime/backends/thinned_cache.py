"""The cache of a decoder with inner pruning: two graphs, and of a thinned prompt fewer positions in the upper one."""

from __future__ import annotations

from typing import Any


class ThinnedCache:
    """A sequence in a decoder of two graphs.

    Attributes:
        low: Keys and values of the lower layers.
        high: Those of the upper layers: fewer, where a prompt was thinned.
    """

    def __init__(self, low: Any, high: Any) -> None:
        self.low, self.high = low, high
        self._prompt = self._dropped = 0

    @property
    def length(self) -> int:
        """Positions that are filled."""
        length: int = self.low.length
        return length

    def restart(self, prompt: int, dropped: int) -> None:
        """Forgets all of the upper layers, which will get all but ``dropped`` of the first ``prompt`` positions."""
        self.high.rewind(0)
        self._prompt, self._dropped = prompt, dropped

    def rewind(self, length: int) -> None:
        """Forgets everything after the first positions; inside of a thinned prompt, all of the upper layers."""
        self.low.rewind(length)
        if length < self._prompt:
            self.restart(0, 0)
        else:
            self.high.rewind(min(length - self._dropped, self.high.length))

    def release(self) -> None:
        """Gives the memory back."""
        self.low.release()
        self.high.release()
