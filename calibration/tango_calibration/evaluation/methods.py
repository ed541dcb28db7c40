"""Ways to keep K of a video's tokens: the operator, the operator without one of its parts, and baselines.

All tokens and no tokens are the bounds. Every baseline keeps exactly as many tokens as Tango keeps of that video at
that ratio. It takes the same features and salience, with the same sinks silenced, and keeps the tokens' order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, TangoError, reference
from tango_plugins.reference import Ints, Reals


@dataclass(frozen=True)
class VideoFeatures:
    """Output of the vision graph for a video.

    Attributes:
        features: X [F, L, D] fp16 or fp32.
        salience: A [F, L] fp32, with sinks; the methods silence them.
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
class Selection:
    """Tokens that a method keeps.

    Attributes:
        tokens: [K, D] in the dtype of the features.
        indices: [K] int32, flat index f·L + l, ascending.
    """

    tokens: Reals
    indices: NDArray[np.int32]


def overlap(before: NDArray[np.int32], after: NDArray[np.int32]) -> float:
    """Share of the tokens ``before`` that are also in ``after``, by their indices [K]."""
    return len(np.intersect1d(before, after)) / max(len(before), 1)


_Method = Callable[[VideoFeatures, PruneParams, int, np.random.Generator], Selection]


def keep(method: str, video: VideoFeatures, params: PruneParams, count: int, rng: np.random.Generator) -> Selection:
    """Keeps some of a video's tokens.

    Args:
        method: One of ``METHODS``.
        video: The video.
        params: Parameters of the operator with the retention ratio; ``tango_params`` sets some of them.
        count: K, at most F·L; the methods in ``OWN_COUNT`` choose their own.
        rng: For random methods.

    Raises:
        TangoError: The method does not exist.
    """
    check(method)
    return METHODS[method](video, params, count, rng)


def tango_params(params: PruneParams) -> PruneParams:
    """The parameters of ``tango``: merged tokens are placed at their anchors, and the budget is the paper's.

    So other methods differ from ``tango`` only as their names say, whatever a bundle was exported with.
    """
    return replace(params, merge_order="anchor", budget="paper")


def check(method: str) -> None:
    """Raises a TangoError if the method does not exist."""
    if method not in METHODS:
        raise TangoError(f"there is no method {method!r}", f"known are {', '.join(METHODS)}")


# The operator, with and without its parts


def _operator(**parameters: object) -> _Method:
    """The operator with other parameters than ``tango``."""

    def method(video: VideoFeatures, params: PruneParams, count: int, rng: np.random.Generator) -> Selection:
        params = replace(tango_params(params), **parameters)  # type: ignore[arg-type]
        pruned = reference.prune(video.features, video.salience, video.seconds, params)
        return Selection(pruned.tokens, pruned.indices)

    return method


def _without_rope(video: VideoFeatures, params: PruneParams, count: int, rng: np.random.Generator) -> Selection:
    """R = X̂: distances ignore time and place."""
    unit, params = reference.normalize(video.features), tango_params(params)
    pruned = reference.compress_video(
        video.features, _silenced(video, params), unit, reference.similarity(unit), params
    )
    return Selection(pruned.tokens, pruned.indices)


def at_equal_count(method: _Method) -> _Method:
    """A method with exactly ``count`` tokens: drops its least salient tokens, or adds the most salient others.

    The operator keeps fewer tokens than its budget if two clusters give the same token. ``budget="exact"`` adds tokens
    in the same way, but drops merged tokens first, by a score of the merge that is not known here.
    """

    def equal(video: VideoFeatures, params: PruneParams, count: int, rng: np.random.Generator) -> Selection:
        kept = method(video, params, count, rng)
        spare = len(kept.indices) - count
        if spare == 0:
            return kept
        salience = _silenced(video, params).ravel()
        if spare > 0:
            stay = np.sort(np.argsort(-salience[kept.indices], kind="stable")[:count])
            return Selection(kept.tokens[stay], kept.indices[stay])
        unkept = np.setdiff1d(np.arange(video.total), kept.indices)
        added = unkept[np.argsort(-salience[unkept], kind="stable")[:-spare]]
        indices = np.concatenate([kept.indices, added]).astype(np.int32)
        order = np.argsort(indices)
        return Selection(np.concatenate([kept.tokens, video.flat()[added]])[order], indices[order])

    return equal


# Baselines


def _all(video: VideoFeatures, params: PruneParams, count: int, rng: np.random.Generator) -> Selection:
    return _chosen(video, np.arange(video.total))


def _none(video: VideoFeatures, params: PruneParams, count: int, rng: np.random.Generator) -> Selection:
    """No token: the answer comes from the question alone."""
    return _chosen(video, np.arange(0))


def _random(video: VideoFeatures, params: PruneParams, count: int, rng: np.random.Generator) -> Selection:
    """Tokens drawn uniformly."""
    return _chosen(video, rng.choice(video.total, count, replace=False))


def _grid(video: VideoFeatures, params: PruneParams, count: int, rng: np.random.Generator) -> Selection:
    """K/F tokens of every frame, rounded so that they add up to K, at the points of a lattice."""
    F, L = video.salience.shape
    shares = np.diff(np.arange(F + 1) * count // F)
    return _chosen(video, np.concatenate([f * L + lattice(int(k), params.grid) for f, k in enumerate(shares)]))


def lattice(k: int, grid: tuple[int, int]) -> Ints:
    """k different positions spread evenly over a grid [H, W].

    About √(k·H/W) rows, the middles of as many equal bands, share the k positions as evenly as possible. The positions
    of a row are the middles of equal parts.

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


def _topk(video: VideoFeatures, params: PruneParams, count: int, rng: np.random.Generator) -> Selection:
    """The most salient tokens of the whole video; the lower index wins ties."""
    return _chosen(video, np.argsort(-_silenced(video, params).ravel(), kind="stable")[:count])


def _dpc_knn(video: VideoFeatures, params: PruneParams, count: int, rng: np.random.Generator) -> Selection:
    """The operator's ``merge`` of all tokens of the whole video, on unit features, without salience and segments."""
    X = video.flat()
    merged = reference.merge(X, reference.normalize(X), count, tango_params(params))
    return Selection(merged.tokens.astype(X.dtype), merged.indices.astype(np.int32))


def _chosen(video: VideoFeatures, indices: Ints) -> Selection:
    indices = np.sort(indices)
    return Selection(video.flat()[indices], indices.astype(np.int32))


def _silenced(video: VideoFeatures, params: PruneParams) -> reference.Floats:
    return reference.silence_sinks(video.salience, params.sinks)


#: Every method by name, in the order of the tables.
METHODS: dict[str, _Method] = {
    "all": _all,
    "none": _none,
    "random": _random,
    "grid": _grid,
    "topk": _topk,
    "dpc-knn": _dpc_knn,
    "tango-topk": at_equal_count(_operator(expansion=1.0)),  # α = 1: as many candidates as slots, so no choice
    "tango-norope": at_equal_count(_without_rope),
    "tango-density": _operator(merge_order="density"),
    "tango": _operator(),
    "tango-exact": _operator(budget="exact"),
}

#: Methods that do not keep as many tokens as ``tango``.
OWN_COUNT = ("all", "none", "tango", "tango-exact")
