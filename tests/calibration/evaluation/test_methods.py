"""Rivals are honest: equal counts, the same sinks, nothing but what their name says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tango_calibration.evaluation.methods import (
    METHODS,
    OWN_COUNT,
    Selection,
    VideoFeatures,
    at_equal_count,
    keep,
    lattice,
)
from tango_plugins import PruneParams, TangoError, op, reference

PARAMS = PruneParams(grid=(4, 5), sink_positions=(3, 7))


def video(seed=0, frames=6, width=24, black=0):
    """A still scene with noise and a cut; the first ``black`` frames are all zeros."""
    rng = np.random.default_rng(seed)
    scenes = rng.standard_normal((2, 20, width))
    X = scenes[np.arange(frames) * 2 // frames] + 0.6 * rng.standard_normal((frames, 20, width)) * (
        rng.random((20, 1)) < 0.6
    )
    X[:black] = 0
    seconds = np.cumsum(rng.uniform(0.2, 3, frames)).astype(np.float32)
    return VideoFeatures(X.astype(np.float32), rng.random((frames, 20)).astype(np.float32), seconds)


def kept_by(method, seen, ratio=0.3, params=PARAMS, seed=0):
    params = params.at(ratio)
    count = reference.prune(seen.features, seen.salience, seen.seconds, params).count
    return keep(method, seen, params, count, np.random.default_rng(seed))


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.8])
@pytest.mark.parametrize("black", [0, 2, 6])
def test_every_rival_keeps_as_many_as_tango(ratio, black):
    seen = video(black=black)
    count = len(kept_by("tango", seen, ratio).indices)
    for method in METHODS:
        kept = kept_by(method, seen, ratio)
        assert (np.diff(kept.indices) > 0).all()
        assert kept.tokens.shape == (len(kept.indices), 24)
        assert (kept.tokens.dtype, kept.indices.dtype) == (np.float32, np.int32)
        if method not in OWN_COUNT:
            assert len(kept.indices) == count, method
    assert len(kept_by("tango-exact", seen, ratio).indices) == op.exact_count(6, 20, PARAMS.at(ratio))
    assert len(kept_by("all", seen, ratio).indices) == 120
    assert len(kept_by("none", seen, ratio).indices) == 0


@pytest.mark.parametrize("method", ["all", "random", "grid", "topk"])
def test_what_is_only_chosen_stays_as_it_is(method):
    seen = video()
    kept = kept_by(method, seen)
    np.testing.assert_array_equal(kept.tokens, seen.flat()[kept.indices])


def test_topk_takes_the_most_salient_that_are_no_sinks():
    seen = video()
    seen.salience[:, PARAMS.sinks] = 9
    kept = kept_by("topk", seen)
    assert not np.isin(kept.indices % 20, PARAMS.sinks).any()
    rest = np.setdiff1d(np.flatnonzero(seen.salience.ravel() < 9), kept.indices)
    assert seen.salience.ravel()[kept.indices].min() > seen.salience.ravel()[rest].max()


def test_random_draws_anew_and_evenly():
    seen = video()
    draws = [kept_by("random", seen, seed=seed).indices for seed in range(300)]
    np.testing.assert_array_equal(draws[0], kept_by("random", seen, seed=0).indices)
    share = np.bincount(np.concatenate(draws), minlength=120) / 300
    assert abs(share - len(draws[0]) / 120).max() < 0.15


@given(st.integers(1, 20), st.integers(1, 20), st.data())
@settings(max_examples=200)
def test_lattice_gives_so_many_places(H, W, data):
    k = data.draw(st.integers(0, H * W))
    places = lattice(k, (H, W))
    assert len(places) == k
    assert (np.diff(places) > 0).all()
    assert k == 0 or (places[0] >= 0 and places[-1] < H * W)


def test_lattice_takes_the_middles():
    assert lattice(1, (3, 3)).tolist() == [4]
    rows, columns = np.divmod(lattice(4, (14, 14)), 14)
    assert (rows.tolist(), columns.tolist()) == ([3, 3, 10, 10], [3, 10, 3, 10])
    rows, columns = np.divmod(lattice(5, (14, 14)), 14)
    assert (rows.tolist(), columns.tolist()) == ([3, 3, 10, 10, 10], [3, 10, 2, 7, 11])


def test_grid_treats_frames_alike():
    shares = np.bincount(kept_by("grid", video()).indices // 20, minlength=6)
    assert shares.max() - shares.min() <= 1


@pytest.mark.parametrize(("method", "depends"), [("dpc-knn", False), ("tango-norope", False), ("tango", True)])
def test_time_counts_with_rope_alone(method, depends):
    seen = video()
    later = VideoFeatures(seen.features, seen.salience, seen.seconds * 7)
    assert np.array_equal(kept_by(method, seen).indices, kept_by(method, later).indices) != depends


@pytest.mark.parametrize(("method", "depends"), [("dpc-knn", False), ("tango-norope", True), ("topk", True)])
def test_salience_counts_except_in_merging(method, depends):
    seen = video()
    turned = VideoFeatures(seen.features, 1 - seen.salience, seen.seconds)
    assert np.array_equal(kept_by(method, seen).indices, kept_by(method, turned).indices) != depends


def test_dpc_knn_merges_everything():
    """Two kinds of token, each a cluster: the anchors move towards the means of their own kind."""
    X = np.repeat(np.eye(4, dtype=np.float32)[:2], 10, axis=0) + 0.01 * np.random.default_rng(0).random((20, 4))
    seen = VideoFeatures(X[None].astype(np.float32), np.ones((1, 20), np.float32), np.zeros(1, np.float32))
    kept = keep("dpc-knn", seen, PARAMS, 2, np.random.default_rng(0))
    assert (kept.indices // 10).tolist() == [0, 1]
    for token, index in zip(kept.tokens, kept.indices, strict=True):
        mean = X[index // 10 * 10 :][:10].mean(axis=0)
        np.testing.assert_allclose(token, 0.6 * X[index] + 0.4 * mean, atol=1e-6)


def test_density_order_changes_tokens_and_not_places():
    seen = video()
    tango, density = kept_by("tango", seen), kept_by("tango-density", seen)
    np.testing.assert_array_equal(tango.indices, density.indices)
    assert not np.array_equal(tango.tokens, density.tokens)


def test_topk_in_tango_selects_by_salience_alone():
    """In one frame with no context tokens, what is selected is what is most salient."""
    params = PruneParams(grid=(4, 5), sink_positions=(), context_ratio=0.0)
    other = 0
    for seed in range(5):
        seen = video(seed, frames=1)
        best = np.sort(np.argsort(-seen.salience.ravel())[:6])
        np.testing.assert_array_equal(kept_by("tango-topk", seen, params=params).indices, best)
        other += not np.array_equal(kept_by("tango", seen, params=params).indices, best)
    assert other


@pytest.mark.parametrize("extra", [-3, 3])
def test_a_count_that_the_operator_misses_is_made_up_for(extra):
    seen = video()
    count = len(kept_by("tango", seen).indices)

    def off(seen, params, count, rng):
        indices = np.arange(10, 10 + count + extra, dtype=np.int32)
        return Selection(seen.flat()[indices], indices)

    kept = at_equal_count(off)(seen, PARAMS, count, np.random.default_rng(0))
    quiet = reference.silence_sinks(seen.salience, PARAMS.sinks).ravel()
    given = np.arange(10, 10 + count + extra)
    if extra > 0:
        expected = np.sort(given[np.argsort(-quiet[given], kind="stable")][:count])
    else:
        others = np.setdiff1d(np.arange(120), given)
        expected = np.sort(np.concatenate([given, others[np.argsort(-quiet[others], kind="stable")][:3]]))
    np.testing.assert_array_equal(kept.indices, expected)
    np.testing.assert_array_equal(kept.tokens, seen.flat()[expected])


@pytest.mark.parametrize("exported", [{}, {"merge_order": "density", "budget": "exact"}])
def test_methods_differ_by_what_their_names_say(exported, monkeypatch):
    """However the bundle was exported."""
    asked, prune = [], reference.prune

    def spy(features, salience, seconds, params):
        asked.append((params.expansion, params.merge_order, params.budget))
        return prune(features, salience, seconds, params)

    monkeypatch.setattr(reference, "prune", spy)
    for method in ("tango-topk", "tango-density", "tango", "tango-exact"):
        keep(method, video(), replace(PARAMS, **exported), 30, np.random.default_rng(0))
    assert asked == [
        (1.0, "anchor", "paper"),
        (1.5, "density", "paper"),
        (1.5, "anchor", "paper"),
        (1.5, "anchor", "exact"),
    ]


def test_an_unknown_method_is_refused():
    with pytest.raises(TangoError, match="there is no method 'magic'"):
        kept_by("magic", video())
