"""Ways to keep K of a video's tokens: the operator, the operator less one of its parts, and its rivals.

All tokens and none are the bounds. Every rival keeps exactly as many tokens as Tango keeps of that video at that ratio,
sees the same features and salience, with the same sinks silenced, and gives its tokens in the order of the video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, TangoError, reference
from tango_plugins.reference import Ints, Reals


@dataclass(frozen=True)
class Seen:
    """What a model saw of a video.

    Attributes:
        features: X [F, L, D] fp16 or fp32.
        salience: A [F, L] fp32, as the model gives it: sinks are silenced by the methods.
        seconds: t [F] fp32.
    """

    features: Reals
    salience: Reals
    seconds: Reals

    @property
    def total(self) -> int:
        """F·L."""
        return self.salience.size

    def flat(self) -> Reals:
        """X [F·L, D]."""
        return self.features.reshape(self.total, -1)


@dataclass(frozen=True)
class Kept:
    """Tokens that a method keeps.

    Attributes:
        tokens: [K, D] in the dtype of the features.
        indices: [K] int32, flat index f·L + l, ascending.
    """

    tokens: Reals
    indices: NDArray[np.int32]


def shared(before: NDArray[np.int32], after: NDArray[np.int32]) -> float:
    """Share of the tokens kept before that are kept after, by their indices [K]."""
    return len(np.intersect1d(before, after)) / max(len(before), 1)


_Method = Callable[[Seen, PruneParams, int, np.random.Generator], Kept]


def keep(method: str, seen: Seen, params: PruneParams, count: int, rng: np.random.Generator) -> Kept:
    """Keeps some of a video's tokens.

    Args:
        method: One of ``METHODS``.
        seen: The video.
        params: Parameters of the operator, the retention ratio among them; ``of_tango`` tells which are used.
        count: K, at most F·L; the methods in ``OWN_COUNT`` find theirs themselves.
        rng: For the method that draws.

    Raises:
        TangoError: There is no such method.
    """
    check(method)
    return METHODS[method](seen, params, count, rng)


def of_tango(params: PruneParams) -> PruneParams:
    """The parameters of ``tango``: these, with each merged token at its anchor's place and the paper's budget.

    The other methods differ from it by what their names say, and not by what a bundle was exported with.
    """
    return replace(params, merge_order="anchor", budget="paper")


def check(method: str) -> None:
    """Refuses a method that does not exist."""
    if method not in METHODS:
        raise TangoError(f"there is no method {method!r}", f"known are {', '.join(METHODS)}")


# The operator, whole or less one of its parts


def _operator(**parameters: object) -> _Method:
    """The operator with these parameters in place of those of ``tango``."""

    def method(seen: Seen, params: PruneParams, count: int, rng: np.random.Generator) -> Kept:
        params = replace(of_tango(params), **parameters)  # type: ignore[arg-type]
        pruned = reference.prune(seen.features, seen.salience, seen.seconds, params)
        return Kept(pruned.tokens, pruned.indices)

    return method


def _without_rope(seen: Seen, params: PruneParams, count: int, rng: np.random.Generator) -> Kept:
    """R = X̂: distances know neither time nor place."""
    unit, params = reference.normalize(seen.features), of_tango(params)
    pruned = reference.compress_video(seen.features, _quiet(seen, params), unit, reference.similarity(unit), params)
    return Kept(pruned.tokens, pruned.indices)


def at_equal_count(method: _Method) -> _Method:
    """The same with exactly ``count`` tokens: drops the least salient that it keeps, or adds the most salient others.

    The operator keeps fewer than its budget where two clusters give the same token, which hangs on the distances.
    ``budget="exact"`` adds alike, but drops merged tokens first, by a score of the merge that is not known here.
    """

    def equal(seen: Seen, params: PruneParams, count: int, rng: np.random.Generator) -> Kept:
        kept = method(seen, params, count, rng)
        spare = len(kept.indices) - count
        if spare == 0:
            return kept
        quiet = _quiet(seen, params).ravel()
        if spare > 0:
            stay = np.sort(np.argsort(-quiet[kept.indices], kind="stable")[:count])
            return Kept(kept.tokens[stay], kept.indices[stay])
        unkept = np.setdiff1d(np.arange(seen.total), kept.indices)
        added = unkept[np.argsort(-quiet[unkept], kind="stable")[:-spare]]
        indices = np.concatenate([kept.indices, added]).astype(np.int32)
        order = np.argsort(indices)
        return Kept(np.concatenate([kept.tokens, seen.flat()[added]])[order], indices[order])

    return equal


# Rivals


def _all(seen: Seen, params: PruneParams, count: int, rng: np.random.Generator) -> Kept:
    return _chosen(seen, np.arange(seen.total))


def _none(seen: Seen, params: PruneParams, count: int, rng: np.random.Generator) -> Kept:
    """No token: what the question alone tells."""
    return _chosen(seen, np.arange(0))


def _random(seen: Seen, params: PruneParams, count: int, rng: np.random.Generator) -> Kept:
    """Every token is as likely as another."""
    return _chosen(seen, rng.choice(seen.total, count, replace=False))


def _grid(seen: Seen, params: PruneParams, count: int, rng: np.random.Generator) -> Kept:
    """K/F tokens of every frame, rounded so that they make K, each time at the points of a lattice."""
    F, L = seen.salience.shape
    shares = np.diff(np.arange(F + 1) * count // F)
    return _chosen(seen, np.concatenate([f * L + lattice(int(k), params.grid) for f, k in enumerate(shares)]))


def lattice(k: int, grid: tuple[int, int]) -> Ints:
    """k positions spread evenly over a grid [H, W].

    About √(k·H/W) rows, the middles of so many equal bands, share the k positions as evenly as they can; in each row
    its positions are the middles of so many equal parts. No position comes twice.

    Args:
        k: At most H·W.
        grid: (H, W).

    Returns:
        Row-major positions [k], ascending.
    """
    H, W = grid
    rows = max(round((k * H / W) ** 0.5), -(-k // W), min(k, 1))
    shares = np.diff(np.arange(rows + 1) * k // max(rows, 1))
    lines = [(2 * i + 1) * H // (2 * rows) * W + _middles(int(n), W) for i, n in enumerate(shares)]
    return np.concatenate([np.zeros(0, np.int64), *lines])


def _middles(n: int, length: int) -> Ints:
    middles: Ints = (2 * np.arange(n) + 1) * length // max(2 * n, 1)
    return middles


def _topk(seen: Seen, params: PruneParams, count: int, rng: np.random.Generator) -> Kept:
    """The most salient tokens of the whole video; ties go to the lower index."""
    return _chosen(seen, np.argsort(-_quiet(seen, params).ravel(), kind="stable")[:count])


def _dpc_knn(seen: Seen, params: PruneParams, count: int, rng: np.random.Generator) -> Kept:
    """The operator's own ``merge`` of all tokens of the whole video, on unit features: no salience, no segments."""
    X = seen.flat()
    merged = reference.merge(X, reference.normalize(X), count, of_tango(params))
    return Kept(merged.tokens.astype(X.dtype), merged.indices.astype(np.int32))


def _chosen(seen: Seen, indices: Ints) -> Kept:
    indices = np.sort(indices)
    return Kept(seen.flat()[indices], indices.astype(np.int32))


def _quiet(seen: Seen, params: PruneParams) -> reference.Floats:
    return reference.silence_sinks(seen.salience, params.sinks)


#: Every method by name, in the order of the tables.
METHODS: dict[str, _Method] = {
    "all": _all,
    "none": _none,
    "random": _random,
    "grid": _grid,
    "topk": _topk,
    "dpc-knn": _dpc_knn,
    "tango-topk": at_equal_count(_operator(expansion=1.0)),  # α = 1: as many candidates as slots, none to choose from
    "tango-norope": at_equal_count(_without_rope),
    "tango-density": _operator(merge_order="density"),
    "tango": _operator(),
    "tango-exact": _operator(budget="exact"),
}

#: The methods that do not take their count from ``tango``.
OWN_COUNT = ("all", "none", "tango", "tango-exact")
