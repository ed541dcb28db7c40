"""Each step on the GPU, with the reference's result of the step before: equal except where values nearly tie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from tango_plugins import reference as ref
from tests.gpu.plugins.device import (
    ANCHORS,
    CANDIDATES,
    CONTEXT,
    DELTA,
    DENSITY,
    MERGE,
    OWNERS,
    ROTATE,
    SEGMENT,
    SELECT,
    SELECTED,
    UNKEPT,
    UNMERGED,
    Device,
)
from tests.gpu.plugins.test_prune_cuda import random_case

CASES = range(1000, 1200)
TIE = 1e-6


@dataclass
class Pool:
    """Tokens that the reference selects from, or merges, together."""

    number: int
    tokens: np.ndarray
    budget: int
    salience: np.ndarray | None = None


class ReferenceSteps:
    """The reference's result of each step, with the GPU's flat token indices and pool numbers."""

    def __init__(self, X, A, t, params):
        F, L, _ = X.shape
        self.params, r = params, params.retention_ratio
        unit = ref.normalize(X)
        self.R = ref.rope(unit, t.astype(np.float64), params)
        self.cosines = ref.similarity(unit).astype(np.float32)
        self.segments = ref.segment(self.cosines.astype(np.float64), params.tau_segment)
        A = ref.silence_sinks(A, params.sinks)
        frame = np.arange(L)
        self.selections, merges = [], []
        for s, (a, b) in enumerate(self.segments):
            n, static = b - a, np.zeros(L, bool)
            ratio = r
            if n > 1:
                static = (self.cosines[a : b - 1] > params.static_threshold).all(axis=0)
                T, g = n * L, (n - 1) * static.sum()
                ratio = min(1.0, r / ((T - g) / T))
                m = max(1, math.ceil(static.sum() * ratio)) if static.any() else 0
                m_s, m_c = ref.split_budget(m, params)
                still = Pool(F + s, a * L + frame[static], m_s, A[a:b, static].mean(axis=0))
                self.selections.append(still)
                merges.append((F + s, [still], m_c))
            moving = frame[~static]
            m = math.ceil(len(moving) * ratio)
            m_s, m_c = ref.split_budget(max(1, m) if n == 1 else m, params)
            frames = [Pool(f, f * L + moving, m_s, A[f, moving]) for f in range(a, b)]
            self.selections += frames
            merges.append((s, frames, m_c * n))
        flat = self.R.reshape(F * L, -1)
        self.selected = {
            p.number: p.tokens[ref.select(p.salience, flat[p.tokens], p.budget, params)] for p in self.selections
        }
        self.merges = []
        for number, parts, budget in merges:
            left = [np.setdiff1d(part.tokens, self.selected[part.number]) for part in parts]
            self.merges.append(Pool(number, np.concatenate(left), budget))
        self.merges.sort(key=lambda pool: pool.number)
        self.flat = flat

    def candidates(self, pool):
        order = np.argsort(-pool.salience, kind="stable")
        return pool.tokens[order[: math.floor(self.params.expansion * pool.budget)]]

    def merged_pools(self):
        """The merge pools that need density peaks, with the index of their first context entry."""
        first = 0
        for pool in self.merges:
            if 0 < pool.budget < len(pool.tokens):
                yield first, pool
            first += len(pool.tokens)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_every_step_follows_from_the_one_before(precision):
    exact = precision == "exact"
    pools = differing = anchors = wrong = 0
    distance_error = 0.0
    for seed in CASES:
        clip, params = random_case(seed)
        X = clip[0]
        F, L, D = X.shape
        N, want, device = F * L, ReferenceSteps(*clip, params), Device(*clip, params, precision)
        padded, ld = -(-D // 64) * 64, -(-N // 32) * 32

        device.run(ROTATE, ROTATE)
        R = device.read("rotated_high", np.float16, F, L, padded)[..., :D].astype(np.float64)
        if exact:
            R += device.read("rotated_low", np.float16, F, L, padded)[..., :D]
        assert np.abs(R / 4096 - want.R).max() < (5e-7 if exact else 3e-4), seed
        assert np.abs(device.read("cosines", np.float32, F, L)[:-1] - want.cosines).max(initial=0) < TIE, seed

        device.write("cosines", want.cosines)
        device.run(SEGMENT, SEGMENT)
        found = device.outputs["segments"].cpu().numpy()
        assert found[: len(want.segments)].tolist() == [list(bounds) for bounds in want.segments], seed
        sizes = device.read("select_pool", np.int32, 2 * F, 3)
        assert sizes[:, 0].sum() == sum(len(pool.tokens) for pool in want.selections), seed

        device.run(CANDIDATES, CANDIDATES)
        listed = device.read("candidates", np.int32, N)
        for pool in want.selections:
            wanted = want.candidates(pool)
            start = pool.number * L
            if pool.number >= F:
                a = want.segments[pool.number - F][0]
                start = (a + 1) * L - len(pool.tokens)
            assert listed[start : start + len(wanted)].tolist() == wanted.tolist(), seed

        device.write_rotated(want.R)
        device.run(SELECT, SELECT)
        kinds = device.read("kind", np.uint8, N)
        for pool in want.selections:
            chosen = pool.tokens[kinds[pool.tokens] == SELECTED]
            pools += 1
            differing += set(chosen) != set(want.selected[pool.number])

        kinds = np.full(N, UNKEPT, np.uint8)
        chosen = np.zeros(2 * F, np.int32)
        for number, tokens in want.selected.items():
            kinds[tokens], chosen[number] = SELECTED, len(tokens)
        device.write("kind", kinds)
        device.write("chosen", chosen)
        device.run(CONTEXT, DENSITY)
        context = np.concatenate([pool.tokens for pool in want.merges])
        assert device.read("context", np.int32, len(context)).tolist() == context.tolist(), seed
        for pool in want.merges:
            if 0 < len(pool.tokens) <= pool.budget:
                kinds[pool.tokens] = UNMERGED
        assert device.read("kind", np.uint8, N).tolist() == kinds.tolist(), seed

        described = device.read("merge_pool", np.int32, 2 * F, 9)
        gram = device.read("gram", np.float32, N * ld)
        norm, spread = (device.read(name, np.float32, N + 16 * F) for name in ("norm", "knn_mean_sq_dist"))
        distances, densities, spread_ = {}, {}, spread.copy()
        for first, pool in want.merged_pools():
            n, k, aligned = len(pool.tokens), min(params.neighbors, len(pool.tokens) - 1), described[pool.number, 6]
            assert described[pool.number, :3].tolist() == [first, n, pool.budget], seed
            D2 = distances[pool.number] = ref.squared_distances(want.flat[pool.tokens])
            row, begin = described[pool.number, 7:]
            own = norm[aligned : aligned + n].astype(np.float64)
            rows = gram[begin : begin + n * row].reshape(n, row)[:, :n]
            assert (rows == rows.T).all(), seed
            error = np.abs(np.maximum(own[:, None] + own - 2.0 * rows, 0) - D2).max()
            distance_error = max(distance_error, error)
            densities[pool.number] = ref.densities(D2, k)
            assert np.abs(np.exp(-spread[aligned : aligned + n]) - densities[pool.number]).max() < (
                2e-6 if exact else 1e-3
            ), seed
            spread_[aligned : aligned + n] = -np.log(densities[pool.number])

        device.write("knn_mean_sq_dist", spread_)
        device.run(DELTA, DELTA)
        score = device.read("score", np.float32, N)
        scores = score.copy()
        for first, pool in want.merged_pools():
            n = len(pool.tokens)
            wanted = densities[pool.number] * ref.deltas(distances[pool.number], densities[pool.number])
            # Where densities tie in fp32, another token is the denser one: delta may be anything.
            spreads = spread_[described[pool.number, 6] :][:n]
            alone = np.array([np.sum(np.abs(spreads - own) < TIE) == 1 for own in spreads])
            assert np.abs(score[first : first + n] - wanted)[alone].max(initial=0) < (3e-3 if exact else 3e-2), seed
            scores[first : first + n] = wanted

        device.write("score", scores)
        device.run(ANCHORS, ANCHORS)
        listed = device.read("anchors", np.int32, N)
        for first, pool in want.merged_pools():
            by_score = np.argsort(-scores[first : first + len(pool.tokens)], kind="stable")[: pool.budget]
            assert listed[first : first + pool.budget].tolist() == by_score.tolist(), seed

        device.run(OWNERS, OWNERS)
        owner = device.read("owner", np.int32, N)
        for first, pool in want.merged_pools():
            n, D2 = len(pool.tokens), distances[pool.number]
            centers = np.sort(listed[first : first + pool.budget])
            mine = owner[first : first + n]
            assert np.isin(mine, centers).all(), seed
            assert (D2[np.arange(n), mine] - D2[:, centers].min(axis=1)).max() < (3e-6 if exact else 3e-3), seed
            anchors, wrong = anchors + n, wrong + (mine != centers[ref.nearest(D2, centers)]).sum()

        device.run(MERGE, MERGE)
        assert device.pruned().count > 0
    print(
        f"{precision}: {differing} of {pools} pools select otherwise, {wrong} of {anchors} tokens join otherwise, "
        f"squared distances to {distance_error:.1e}"
    )
    assert distance_error < (1e-6 if exact else 4e-3)
    assert differing <= (0.002 if exact else 0.02) * pools
    assert wrong <= (0.0005 if exact else 0.02) * anchors
