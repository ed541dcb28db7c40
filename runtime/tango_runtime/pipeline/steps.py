"""Decode steps that sequences share.

A sequence says early which token it takes next, and asks for the logits late. Whoever asks first has the step computed,
together with the steps of other sequences that wait. So sequences that take turns in one thread advance together,
without a thread of their own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tango_plugins import TangoError
from tango_runtime.backends.base import Backend, KVCache, Logits


@dataclass(eq=False)
class PendingStep:
    """A token that a sequence takes next; :meth:`DecodeSteps.add` makes it.

    Attributes:
        backend: Computes the step.
        cache: The sequence.
        token: The token.
        result: Logits [vocabulary] after the token, or why there are none; None while it waits.
        ms: Milliseconds of the step, the same for all sequences that shared it.
    """

    backend: Backend
    cache: KVCache
    token: int
    result: Logits | TangoError | None = None
    ms: float = 0.0

    @property
    def done(self) -> bool:
        """Whether the token is in the cache."""
        return self.result is not None and not isinstance(self.result, TangoError)


class DecodeSteps:
    """The steps that wait. For one thread, like the backends."""

    def __init__(self) -> None:
        self._waiting: list[PendingStep] = []

    def add(self, backend: Backend, cache: KVCache, token: int) -> PendingStep:
        """Adds the next token of a sequence, which has room for it.

        Nothing else may be done with the sequence before :meth:`logits` or :meth:`remove`.
        """
        step = PendingStep(backend, cache, token)
        self._waiting.append(step)
        return step

    def remove(self, step: PendingStep) -> None:
        """Drops a step. It may be ``done`` already, with another sequence's."""
        if step in self._waiting:
            self._waiting.remove(step)

    def logits(self, step: PendingStep) -> Logits:
        """Logits [vocabulary] after a step's token.

        They are computed now, with the steps that wait for the longest, unless that was done for another sequence.

        Raises:
            TangoError: The backend failed. No sequence of the step has become longer.
        """
        if step.result is None:
            others = [other for other in self._waiting if other is not step and other.backend is step.backend]
            self._compute([step, *others[: step.backend.sequences - 1]])
        assert step.result is not None
        if isinstance(step.result, TangoError):
            raise step.result
        return step.result

    def _compute(self, steps: list[PendingStep]) -> None:
        begin = time.perf_counter()
        backend, tokens = steps[0].backend, [(step.cache, step.token) for step in steps]
        results: list[Logits | TangoError]
        try:
            results = [backend.decode(*tokens[0])] if backend.sequences == 1 else [*backend.decode_together(tokens)]
        except TangoError as error:
            results = [error] * len(steps)
        ms = 1e3 * (time.perf_counter() - begin)
        for step, result in zip(steps, results, strict=True):
            step.result, step.ms = result, ms
            self._waiting.remove(step)
