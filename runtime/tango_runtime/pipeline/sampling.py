"""Logits → the next token id: greedy, or temperature and top-p, of those that a JSON schema allows."""

from __future__ import annotations

import math

import numpy as np
from numpy.random import default_rng  # at the top: an import in mid-run would swallow a ctrl-C
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_runtime.backends.base import Logits
from tango_runtime.pipeline.structured import JsonConstraint
from tango_runtime.util.numbers import is_integer, is_number


class Sampler:
    """Draws token ids from logits.

    Top-p (nucleus sampling, arXiv 1904.09751) keeps the most likely tokens up to the one with which their probability
    reaches p, so at least one, and draws among them in proportion. Among equal logits the lower id counts as the
    likelier. Probabilities are computed in fp64; the same seed and logits give the same ids.

    Args:
        temperature: Divides the logits; 0 is greedy, which always takes the most likely token.
        top_p: p in (0, 1]; 1 keeps every token.
        seed: Seed of the random generator, at least 0; None takes one from the operating system.
        constraint: Which tokens may come next; None for all.

    Raises:
        TangoError: A value is outside its range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        constraint: JsonConstraint | None = None,
    ) -> None:
        if not is_number(temperature) or not 0 <= temperature < math.inf:
            raise TangoError(f"temperature is {temperature!r}", "it must be 0 (greedy) or a positive number")
        if not is_number(top_p) or not 0 < top_p <= 1:
            raise TangoError(f"top_p is {top_p!r}", "it must be above 0 and at most 1")
        if seed is not None and (not is_integer(seed) or seed < 0):
            raise TangoError(f"seed is {seed!r}", "it must be an integer of at least 0")
        self._temperature = temperature
        self._top_p = top_p
        self._generator = default_rng(seed)
        self._constraint = constraint

    @property
    def done(self) -> bool:
        """Whether the tokens drawn so far are all that the constraint allows."""
        return self._constraint is not None and self._constraint.done

    def __call__(self, logits: Logits) -> int:
        """Draws one token id.

        Args:
            logits: fp32 [V]; −inf bars a token. Those on a device stay there if the sampling is greedy and free.

        Returns:
            The id, in [0, V).

        Raises:
            TangoError: The logits are not one row, or hold NaN or +inf, or bar every token; or the constraint failed.
        """
        if len(logits.shape) != 1 or logits.shape[0] == 0:
            raise TangoError(f"the logits have shape {list(logits.shape)}", "give those of one position, [V]")
        if self._constraint is None:
            return self._choose(logits)
        token = self._choose(self._constraint.mask(logits))
        self._constraint.accept(token)
        return token

    def _choose(self, logits: Logits) -> int:
        if self._temperature > 0:
            logits = np.asarray(logits)
        best, value = argmax(logits)
        if not math.isfinite(value):
            raise TangoError(
                f"the logit of token {best} is {value}",
                "look for changed files: tango inspect BUNDLE --verify; if there are none, the decoder overflowed: "
                "export with --dtype fp32",
            )
        if self._temperature == 0:
            return best
        return self._draw(np.asarray(logits, np.float64))

    def _draw(self, logits: NDArray[np.float64]) -> int:
        order = np.argsort(-logits, kind="stable")
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to exp(−inf) = 0
            weights = np.exp((logits[order] - logits[order[0]]) / self._temperature)
        reached = np.cumsum(weights / weights.sum())
        kept = 1 + int(np.searchsorted(reached[:-1], self._top_p))
        # random() is below 1, but its product with the last sum may round up to it.
        drawn = np.searchsorted(reached[:kept], self._generator.random() * reached[kept - 1], side="right")
        return int(order[min(int(drawn), kept - 1)])


def argmax(logits: Logits) -> tuple[int, float]:
    """Index and value of the largest logit: the first NaN, if there is one; else the lowest id of the largest."""
    if not isinstance(logits, np.ndarray):
        return logits.argmax()
    index = int(np.argmax(logits))
    return index, float(logits[index])
