"""The Tango operator in NumPy: the reference for all other implementations, and the implementation on a CPU.

docs/reference/operator.md describes the steps; there is one function per step, with the same name. All arithmetic is
fp64, angles included. Ties go to the lower index, so every sort is stable and every minimum the first one.

Letters: F frames, L = H·W tokens per frame, D width, N tokens of a step's input, X features [N, D], A salience [N],
R rotated features [N, D] (fp64), ``D2`` squared distances [N, N].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_plugins import op
from tango_plugins.errors import TangoError
from tango_plugins.params import PruneParams

Reals = NDArray[np.floating[Any]]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: Smallest norm that features are divided by.
EPSILON = 1e-12

#: Largest number of frames of a segment.
MAX_WINDOW = 1024

#: Rows of an N × N matrix that are processed at a time: 12 MB at N = 6272.
_ROWS = 256


@dataclass(frozen=True)
class Pruned:
    """The tokens of a video that the operator keeps.

    Attributes:
        tokens: [K, D] in the dtype of the features.
        indices: [K] int32, flat index f·L + l of each token, ascending.
        count: K.
        segments: [S, 2] int32, first frame and one past the last of each segment.
        merged: [K] bool, True where ``merge`` kept the token as context, False where it was selected as salient or
            added by ``budget="exact"``.
    """

    tokens: Reals
    indices: NDArray[np.int32]
    count: int
    segments: NDArray[np.int32]
    merged: Bools


@dataclass(frozen=True)
class Kept:
    """M tokens that a step keeps.

    Attributes:
        indices: [M], indices into the step's input.
        tokens: [M, D], their values.
        merged: [M] bool, as in :class:`Pruned`.
        score: [M], density·delta of a merged token, infinite if none was computed.
    """

    indices: Ints
    tokens: Reals
    merged: Bools
    score: Floats

    def at(self, places: Ints) -> Kept:
        """The same tokens in a larger input, where ``places`` [N] are the indices of the step's input."""
        return replace(self, indices=places[self.indices])

    def only(self, which: Ints) -> Kept:
        """A selection of the tokens, in this order."""
        return Kept(self.indices[which], self.tokens[which], self.merged[which], self.score[which])


def prune(features: Reals, salience: Reals, timestamps: Reals, params: PruneParams) -> Pruned:
    """Prunes the visual tokens of a video (arXiv 2604.09547).

    Args:
        features: X [F, L, D] fp16, fp32 or fp64, visual tokens after projector and pooling, row-major on the grid.
        salience: A [F, L] fp32 or fp64, attention that each token receives.
        timestamps: t [F] fp32 or fp64, seconds of each frame in the source video.
        params: Parameters of the operator; its grid must have L positions.

    Raises:
        TangoError: An array has the wrong shape or dtype, or holds a value that is not finite.
    """
    features, salience, timestamps = np.asarray(features), np.asarray(salience), np.asarray(timestamps)
    check(features, salience, timestamps, params)
    unit = normalize(features)
    cosines = similarity(unit)
    rotated = rope(unit, timestamps.astype(np.float64), params)
    del unit
    return compress_video(features, silence_sinks(salience, params.sinks), rotated, cosines, params)


def compress_video(X: Reals, A: Floats, R: Floats, cosines: Floats, params: PruneParams) -> Pruned:
    """Steps 3 to 7, given the rotated features and the cosines between frames.

    Args:
        X: Features [F, L, D].
        A: Salience [F, L], 0 at the sinks.
        R: Rotated features [F, L, D].
        cosines: s [F − 1, L].
        params: Parameters of the operator.
    """
    F, L, D = X.shape
    segments = segment(cosines, params.tau_segment)
    parts = []
    for a, b in segments:
        part = compress_segment(X[a:b], A[a:b], R[a:b], cosines[a : b - 1], params)
        parts.append(part.at(np.arange(a * L, b * L)))
    kept = join(*parts)
    if params.budget == "exact":
        kept = make_exact(kept, X.reshape(-1, D), A.ravel(), op.exact_count(F, L, params))
    kept = kept.only(np.argsort(kept.indices))
    return Pruned(
        tokens=kept.tokens.astype(X.dtype),
        indices=kept.indices.astype(np.int32),
        count=len(kept.indices),
        segments=np.array(segments, dtype=np.int32),
        merged=kept.merged,
    )


def check(features: Reals, salience: Reals, timestamps: Reals, params: PruneParams) -> None:
    """Rejects arrays that the operator cannot process, by name."""
    wide, single = (np.float16, np.float32, np.float64), (np.float32, np.float64)
    for name, array, dtypes in (
        ("features", features, wide),
        ("salience", salience, single),
        ("timestamps", timestamps, single),
    ):
        if array.dtype not in dtypes:
            known = ", ".join(dtype.__name__ for dtype in dtypes)
            raise TangoError(f"{name} has dtype {array.dtype}", f"it must be one of {known}")
    H, W = params.grid
    if features.ndim != 3 or 0 in features.shape or features.shape[1] != H * W:
        hint = f"it must be [F, L, D] with L = {H * W} tokens per frame, those of the grid {H}×{W}"
        raise TangoError(f"features has shape {list(features.shape)}", hint)
    F, L, _ = features.shape
    for name, array, shape in (("salience", salience, (F, L)), ("timestamps", timestamps, (F,))):
        if array.shape != shape:
            raise TangoError(f"{name} has shape {list(array.shape)}", f"with these features it must be {list(shape)}")
    for name, array in (("features", features), ("salience", salience), ("timestamps", timestamps)):
        finite = np.isfinite(array)
        if not finite.all():
            first = tuple(int(i) for i in np.unravel_index(finite.argmin(), array.shape))
            place = f"{name}[{', '.join(map(str, first))}]"
            raise TangoError(
                f"{place} is {array[first]}", f"every value of {name} must be finite; check the stage that computes it"
            )


# Step 1: sinks


def silence_sinks(salience: Reals, sinks: tuple[int, ...]) -> Floats:
    """A copy of the salience [F, L] with 0 at the sink positions."""
    quiet = salience.astype(np.float64)
    quiet[:, list(sinks)] = 0
    return quiet


# Step 2: ST-RoPE


def normalize(features: Reals) -> Floats:
    """X̂ = X / max(‖X‖₂, 1e-12): rows of norm 1, or of norm 0 if a token is all zeros."""
    unit = features.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), EPSILON)
    return unit


def rope(unit: Floats, timestamps: Floats, params: PruneParams) -> Floats:
    """R [F, L, D]: unit features whose three sections are rotated by time, grid row and grid column.

    The sections are D − 4·floor(D/6), 2·floor(D/6) and 2·floor(D/6) wide. With D < 6 there is only the time section.
    """
    D = unit.shape[-1]
    d = 2 * (D // 6)
    time, height, width = np.split(unit, [D - 2 * d, D - d], axis=-1)
    row, column = (grid.ravel() for grid in np.indices(params.grid))
    sections = (
        rotate(time, timestamps[:, None], params.time_base),
        rotate(height, row[None, :], params.space_base),
        rotate(width, column[None, :], params.space_base),
    )
    return np.concatenate(sections, axis=-1)


def rotate(section: Floats, position: NDArray[Any], base: float) -> Floats:
    """Half-split rotation of the last axis: component j with component j + d/2, by position · base^(−2j/d).

    Args:
        section: [..., d]. The last component of an odd d is not rotated.
        position: Broadcasts against the leading axes.
        base: Base of the geometric sequence of angles.
    """
    d = section.shape[-1]
    half = d // 2
    angle = position[..., None] * base ** (-2 * np.arange(half) / d)
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = section[..., :half], section[..., half : 2 * half]
    rotated = section.copy()
    rotated[..., :half] = first * cos - second * sin
    rotated[..., half : 2 * half] = second * cos + first * sin
    return rotated


# Step 3: segments


def similarity(unit: Floats) -> Floats:
    """s [F − 1, L]: cosine between each position's features in a frame and in the next."""
    # Rounding can make the cosine of equal features exceed 1, above every threshold.
    cosines: Floats = np.einsum("fld,fld->fl", unit[:-1], unit[1:])
    return np.minimum(cosines, 1)


def segment(cosines: Floats, threshold: float) -> list[tuple[int, int]]:
    """Partitions the frames so that the total gain is largest.

    gain(i, j) = static(i, j)·(j − i), where static(i, j) counts the positions whose cosines all exceed the threshold
    from frame i to frame j. Ties go to the shortest last segment.

    Args:
        cosines: s [F − 1, L].
        threshold: τ_seg.

    Returns:
        First frame and one past the last of each segment, in order.
    """
    F, L = cosines.shape[0] + 1, cosines.shape[1]
    best = np.zeros(F + 1, dtype=np.int64)  # best[e]: largest gain of the first e frames
    length = np.zeros(F + 1, dtype=np.int64)  # length[e]: length of the last segment of that partition
    run = np.zeros(L, dtype=np.int64)  # for how many frames each position has been unchanged
    for end in range(1, F + 1):
        if end > 1:
            run = (run + 1) * (cosines[end - 2] > threshold)
        w = np.arange(1, min(end, MAX_WINDOW) + 1)
        static = np.bincount(run, minlength=end)[::-1].cumsum()[::-1]  # static[q]: positions with a run of at least q
        total = best[end - w] + static[w - 1] * (w - 1)
        length[end] = w[total.argmax()]
        best[end] = total.max()
    bounds = []
    end = F
    while end > 0:
        bounds.append((int(end - length[end]), int(end)))
        end -= int(length[end])
    return bounds[::-1]


# Step 4: each segment


def compress_segment(X: Reals, A: Floats, R: Floats, cosines: Floats, params: PruneParams) -> Kept:
    """Step 4 for a segment of n frames.

    Args:
        X: Features [n, L, D].
        A: Salience [n, L], 0 at the sinks.
        R: Rotated features [n, L, D].
        cosines: s [n − 1, L] between the frames of the segment.
        params: Parameters of the operator.
    """
    n, L, _ = X.shape
    r = params.operator_ratio
    if n == 1:
        return compress(X[0], A[0], R[0], r, params)
    static = (cosines > params.static_threshold).all(axis=0)
    S, dynamic = np.flatnonzero(static), np.flatnonzero(~static)
    T, g = n * L, (n - 1) * len(S)
    ratio = min(1.0, r / ((T - g) / T))
    return join(
        compress(X[:, S].mean(axis=0, dtype=np.float64), A[:, S].mean(axis=0), R[0, S], ratio, params).at(S),
        compress_dynamic(X[:, dynamic], A[:, dynamic], R[:, dynamic], ratio, params).at(
            (L * np.arange(n)[:, None] + dynamic).ravel()
        ),
    )


def compress_dynamic(X: Reals, A: Floats, R: Floats, ratio: float, params: PruneParams) -> Kept:
    """The dynamic part of a segment [n, L_d, …]: selects in each frame, and merges over all frames."""
    n, L_d, D = X.shape
    m_s, m_c = split_budget(math.ceil(L_d * ratio), params)
    chosen = np.concatenate([f * L_d + select(A[f], R[f], m_s, params) for f in range(n)])
    return _select_and_merge(X.reshape(-1, D), R.reshape(-1, D), chosen, m_c * n, params)


# Step 5: compress


def compress(X: Reals, A: Floats, R: Floats, ratio: float, params: PruneParams) -> Kept:
    """Compresses N tokens to max(1, ceil(N·ratio)), and no tokens to none."""
    m = max(1, math.ceil(len(X) * ratio)) if len(X) else 0
    m_s, m_c = split_budget(m, params)
    return _select_and_merge(X, R, select(A, R, m_s, params), m_c, params)


def split_budget(m: int, params: PruneParams) -> tuple[int, int]:
    """Splits a budget of m into m_s salient and m_c context tokens."""
    m_s = math.floor(m * (1 - params.context_ratio))
    return m_s, m - m_s


def _select_and_merge(X: Reals, R: Floats, chosen: Ints, b: int, params: PruneParams) -> Kept:
    rest = np.setdiff1d(np.arange(len(X)), chosen)
    return join(_as_is(chosen, X, merged=False), merge(X[rest], R[rest], b, params).at(rest))


# Step 6: select


def select(A: Floats, R: Floats, m_s: int, params: PruneParams) -> Ints:
    """Selects at most m_s of N tokens that are salient and differ from each other.

    Returns:
        Indices, ascending. Fewer than m_s if two clusters give the same token.
    """
    candidates = np.argsort(-A, kind="stable")[: math.floor(params.expansion * m_s)]
    if len(candidates) <= max(m_s, 1):
        return np.sort(candidates)
    D2 = squared_distances(R[candidates])
    centers = np.sort(density_peaks(D2, m_s, params.neighbors)[0])
    # Candidates are in order of salience, so the first one of a cluster is its most salient.
    clusters, first = np.unique(nearest(D2, centers), return_index=True)
    empty = np.delete(centers, clusters)
    chosen: Ints = np.unique(candidates[np.concatenate([first, empty])])
    return chosen


# Step 7: merge


def merge(X: Reals, R: Floats, b: int, params: PruneParams) -> Kept:
    """Merges N tokens into b anchors; if N ≤ b, all tokens stay as they are.

    An anchor that no token joins keeps its own features. It happens where the anchor itself joins an equal anchor of
    lower index.
    """
    if len(X) <= b or b == 0:
        return _as_is(np.arange(min(len(X), b)), X, merged=True)
    D2 = squared_distances(R)
    by_score, score = density_peaks(D2, b, params.neighbors)
    anchors = np.sort(by_score)
    owner = nearest(D2, anchors)
    del D2
    rows = [_merged(X, a, members, params) for a, members in zip(anchors, _groups(owner, b), strict=True)]
    places = by_score if params.merge_order == "density" else anchors
    return Kept(places, np.stack(rows), np.ones(b, dtype=bool), score[places])


def _merged(X: Reals, anchor: np.int64, members: Ints, params: PruneParams) -> Floats:
    own: Floats = X[anchor].astype(np.float64)
    if len(members) == 0:
        return own
    w = max(1 / len(members), params.anchor_weight)
    mean: Floats = X[members].mean(axis=0, dtype=np.float64)
    merged: Floats = w * own + (1 - w) * mean
    return merged


def _groups(owner: Ints, b: int) -> list[Ints]:
    """The members of each of b groups, ascending, given each token's group [N]."""
    ends = np.bincount(owner, minlength=b).cumsum()
    return np.split(np.argsort(owner, kind="stable"), ends[:-1])


# Step 8: density peaks


def squared_distances(R: Floats) -> Floats:
    """Squared Euclidean distances [N, N], bitwise symmetric and 0 on the diagonal: ties must not depend on rounding.

    2 − 2⟨R_i, R_j⟩ for rows of norm 1. All-zero rows, as of a black frame, have distance 0 from each other.
    """
    D2: Floats = R @ R.T
    norm = D2.diagonal().copy()
    for rows in _blocks(len(R)):
        D2[rows] = np.maximum((norm[rows, None] + norm) - 2 * D2[rows], 0)
    return D2


def density_peaks(D2: Floats, b: int, k: int) -> tuple[Ints, Floats]:
    """DPC-KNN: the b tokens of highest density·delta, in that order, and density·delta of all tokens [N]."""
    density = densities(D2, k)
    score = density * deltas(D2, density)
    return np.argsort(-score, kind="stable")[:b], score


def densities(D2: Floats, k: int) -> Floats:
    """density_i = exp(−mean of the k smallest squares of row i), without the smallest one, which is i itself."""
    N = len(D2)
    k = min(k, N - 1)
    if k == 0:
        return np.ones(N)
    near = [np.sort(np.partition(D2[rows], k, axis=1)[:, : k + 1], axis=1) for rows in _blocks(N)]
    density: Floats = np.exp(-np.concatenate(near)[:, 1:].mean(axis=1))
    return density


def deltas(D2: Floats, density: Floats) -> Floats:
    """delta_i: distance to the nearest denser token; for the densest token the largest distance of the matrix."""
    N = len(D2)
    order = np.argsort(-density, kind="stable")
    nearest_denser = np.empty(N)
    for rows in _blocks(N):
        block = D2[order[rows]][:, order[: rows.stop]]
        denser = np.arange(block.shape[1]) < np.arange(rows.start, rows.stop)[:, None]
        nearest_denser[order[rows]] = block.min(axis=1, where=denser, initial=np.inf)
    nearest_denser[order[0]] = D2.max()
    return np.sqrt(nearest_denser)


def nearest(D2: Floats, centers: Ints) -> Ints:
    """The index of each token's nearest center [N]; ``centers`` is ascending."""
    return np.concatenate([D2[rows][:, centers].argmin(axis=1) for rows in _blocks(len(D2))])


def _blocks(N: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, N)) for start in range(0, N, _ROWS))


# Budget "exact"


def make_exact(kept: Kept, X: Reals, A: Floats, count: int) -> Kept:
    """Drops or adds tokens until ``count`` are kept.

    It drops merged context tokens first, by lowest density·delta of the anchor in its own ``merge``. If they do not
    suffice, it drops unmerged context tokens, then selected ones, by lowest salience. It adds unkept tokens of highest
    salience, neither averaged nor merged. Salience is that of the token's own frame after step 1. Of equal tokens the
    lower index is kept or added.

    Args:
        kept: The paper's selection, with flat indices.
        X: Features [F·L, D].
        A: Salience [F·L].
        count: K.
    """
    spare = len(kept.indices) - count
    if spare < 0:
        unkept = np.setdiff1d(np.arange(len(X)), kept.indices)
        added = unkept[np.argsort(-A[unkept], kind="stable")[:-spare]]
        return join(kept, _as_is(added, X, merged=False))
    scored = np.isfinite(kept.score)
    stage = np.where(scored, 2, np.where(kept.merged, 1, 0))
    priority = np.where(scored, kept.score, A[kept.indices])
    return kept.only(np.lexsort((kept.indices, -priority, stage))[:count])


def join(*parts: Kept) -> Kept:
    """All tokens of the parts."""
    return Kept(
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.merged for part in parts]),
        np.concatenate([part.score for part in parts]),
    )


def _as_is(indices: Ints, X: Reals, merged: bool) -> Kept:
    return Kept(indices, X[indices], np.full(len(indices), merged), np.full(len(indices), np.inf))
