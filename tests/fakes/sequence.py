"""A backend that holds one sequence, so that a test need not pass its cache around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class OneSequence:
    """A backend with one cache; everything else is the backend's.

    Args:
        backend: The backend.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.cache: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def prefill(self, pieces: Sequence[Any], capacity: int) -> Any:
        """Starts a sequence in the place of the one before."""
        if self.cache is not None:
            self.cache.release()
        self.cache = None
        self.cache = self.backend.new_cache(capacity)
        return self.backend.extend(self.cache, pieces)

    def extend(self, embeddings: Any) -> Any:
        """Appends embeddings [N, D]."""
        return self.backend.extend(self.cache, [embeddings])

    def rewind(self, length: int) -> None:
        """Forgets what follows the first ``length`` positions."""
        self.backend.rewind(self.cache, length)

    def decode(self, token: int) -> Any:
        """Appends a token."""
        return self.backend.decode(self.cache, token)
