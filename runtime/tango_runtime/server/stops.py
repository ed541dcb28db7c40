"""Stop strings: an answer ends before the first of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class StopTexts:
    """Cuts an answer at the first of some texts.

    Args:
        texts: What ends it; may be empty.

    Attributes:
        met: Whether one of them came.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self.met = False

    def cut(self, pieces: Iterable[str]) -> Iterator[str]:
        """Gives pieces up to the first stop text; what may be the beginning of one waits for what follows."""
        held = ""
        for piece in pieces:
            held += piece
            found = [at for at in map(held.find, self._texts) if at >= 0]
            if found:
                self.met, held = True, held[: min(found)]
                break
            safe = len(held) - self._maybe(held)
            yield held[:safe]
            held = held[safe:]
        if held:
            yield held

    def _maybe(self, text: str) -> int:
        """Characters at the end of a text that a stop text may begin with."""
        longest = max((len(stop) for stop in self._texts), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._texts):
                return count
        return 0
