"""Comparisons are fair: equal counts, the same sinks, differences only as the names say."""

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


def make_video(seed=0, frames=6, width=24, black=0):
    """A still scene with noise and a cut; the first ``black`` frames are all zeros."""
    rng = np.random.default_rng(seed)
    scenes = rng.standard_normal((2, 20, width))
    X = scenes[np.arange(frames) * 2 // frames] + 0.6 * rng.standard_normal((frames, 20, width)) * (
        rng.random((20, 1)) < 0.6
    )
    X[:black] = 0
    seconds = np.cumsum(rng.uniform(0.2, 3, frames)).astype(np.float32)
    return VideoFeatures(X.astype(np.float32), rng.random((frames, 20)).astype(np.float32), seconds)


def kept_by(method, video, ratio=0.3, params=PARAMS, seed=0):
    params = params.at(ratio)
    count = reference.prune(video.features, video.salience, video.seconds, params).count
    return keep(method, video, params, count, np.random.default_rng(seed))


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.8])
@pytest.mark.parametrize("black", [0, 2, 6])
def test_every_baseline_keeps_as_many_tokens_as_tango(ratio, black):
    video = make_video(black=black)
    count = len(kept_by("tango", video, ratio).indices)
    for method in METHODS:
        kept = kept_by(method, video, ratio)
        assert (np.diff(kept.indices) > 0).all()
        assert kept.tokens.shape == (len(kept.indices), 24)
        assert (kept.tokens.dtype, kept.indices.dtype) == (np.float32, np.int32)
        if method not in OWN_COUNT:
            assert len(kept.indices) == count, method
    assert len(kept_by("tango-exact", video, ratio).indices) == op.exact_count(6, 20, PARAMS.at(ratio))
    assert len(kept_by("all", video, ratio).indices) == 120
    assert len(kept_by("none", video, ratio).indices) == 0


@pytest.mark.parametrize("method", ["all", "random", "grid", "topk"])
def test_chosen_tokens_are_not_changed(method):
    video = make_video()
    kept = kept_by(method, video)
    np.testing.assert_array_equal(kept.tokens, video.flat()[kept.indices])


def test_topk_takes_the_most_salient_tokens_except_sinks():
    video = make_video()
    video.salience[:, PARAMS.sinks] = 9
    kept = kept_by("topk", video)
    assert not np.isin(kept.indices % 20, PARAMS.sinks).any()
    rest = np.setdiff1d(np.flatnonzero(video.salience.ravel() < 9), kept.indices)
    assert video.salience.ravel()[kept.indices].min() > video.salience.ravel()[rest].max()


def test_random_is_seeded_and_uniform():
    video = make_video()
    draws = [kept_by("random", video, seed=seed).indices for seed in range(300)]
    np.testing.assert_array_equal(draws[0], kept_by("random", video, seed=0).indices)
    share = np.bincount(np.concatenate(draws), minlength=120) / 300
    assert abs(share - len(draws[0]) / 120).max() < 0.15


@given(st.integers(1, 20), st.integers(1, 20), st.data())
@settings(max_examples=200)
def test_lattice_has_k_places(H, W, data):
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


def test_grid_keeps_as_many_tokens_of_each_frame():
    shares = np.bincount(kept_by("grid", make_video()).indices // 20, minlength=6)
    assert shares.max() - shares.min() <= 1


@pytest.mark.parametrize(("method", "depends"), [("dpc-knn", False), ("tango-norope", False), ("tango", True)])
def test_only_rope_depends_on_time(method, depends):
    video = make_video()
    later = VideoFeatures(video.features, video.salience, video.seconds * 7)
    assert np.array_equal(kept_by(method, video).indices, kept_by(method, later).indices) != depends


@pytest.mark.parametrize(("method", "depends"), [("dpc-knn", False), ("tango-norope", True), ("topk", True)])
def test_only_merging_ignores_salience(method, depends):
    video = make_video()
    inverted = VideoFeatures(video.features, 1 - video.salience, video.seconds)
    assert np.array_equal(kept_by(method, video).indices, kept_by(method, inverted).indices) != depends


def test_dpc_knn_merges_all_tokens():
    """Two clusters of tokens: the anchors move toward the means of their clusters."""
    X = np.repeat(np.eye(4, dtype=np.float32)[:2], 10, axis=0) + 0.01 * np.random.default_rng(0).random((20, 4))
    video = VideoFeatures(X[None].astype(np.float32), np.ones((1, 20), np.float32), np.zeros(1, np.float32))
    kept = keep("dpc-knn", video, PARAMS, 2, np.random.default_rng(0))
    assert (kept.indices // 10).tolist() == [0, 1]
    for token, index in zip(kept.tokens, kept.indices, strict=True):
        mean = X[index // 10 * 10 :][:10].mean(axis=0)
        np.testing.assert_allclose(token, 0.6 * X[index] + 0.4 * mean, atol=1e-6)


def test_density_order_changes_tokens_but_not_indices():
    video = make_video()
    tango, density = kept_by("tango", video), kept_by("tango-density", video)
    np.testing.assert_array_equal(tango.indices, density.indices)
    assert not np.array_equal(tango.tokens, density.tokens)


def test_topk_in_tango_selects_only_by_salience():
    """In one frame without context tokens, it selects the most salient tokens."""
    params = PruneParams(grid=(4, 5), sink_positions=(), context_ratio=0.0)
    other = 0
    for seed in range(5):
        video = make_video(seed, frames=1)
        best = np.sort(np.argsort(-video.salience.ravel())[:6])
        np.testing.assert_array_equal(kept_by("tango-topk", video, params=params).indices, best)
        other += not np.array_equal(kept_by("tango", video, params=params).indices, best)
    assert other


@pytest.mark.parametrize("extra", [-3, 3])
def test_an_unequal_count_is_corrected(extra):
    video = make_video()
    count = len(kept_by("tango", video).indices)

    def off(video, params, count, rng):
        indices = np.arange(10, 10 + count + extra, dtype=np.int32)
        return Selection(video.flat()[indices], indices)

    kept = at_equal_count(off)(video, PARAMS, count, np.random.default_rng(0))
    salience = reference.silence_sinks(video.salience, PARAMS.sinks).ravel()
    given = np.arange(10, 10 + count + extra)
    if extra > 0:
        expected = np.sort(given[np.argsort(-salience[given], kind="stable")][:count])
    else:
        others = np.setdiff1d(np.arange(120), given)
        expected = np.sort(np.concatenate([given, others[np.argsort(-salience[others], kind="stable")][:3]]))
    np.testing.assert_array_equal(kept.indices, expected)
    np.testing.assert_array_equal(kept.tokens, video.flat()[expected])


@pytest.mark.parametrize("exported", [{}, {"merge_order": "density", "budget": "exact"}])
def test_methods_differ_only_as_their_names_say(exported, monkeypatch):
    """However the bundle was exported."""
    asked, prune = [], reference.prune

    def spy(features, salience, seconds, params):
        asked.append((params.expansion, params.merge_order, params.budget))
        return prune(features, salience, seconds, params)

    monkeypatch.setattr(reference, "prune", spy)
    for method in ("tango-topk", "tango-density", "tango", "tango-exact"):
        keep(method, make_video(), replace(PARAMS, **exported), 30, np.random.default_rng(0))
    assert asked == [
        (1.0, "anchor", "paper"),
        (1.5, "density", "paper"),
        (1.5, "anchor", "paper"),
        (1.5, "anchor", "exact"),
    ]


def test_an_unknown_method_is_rejected():
    with pytest.raises(TangoError, match="there is no method 'magic'"):
        kept_by("magic", make_video())


def test_own_counts_are_methods():
    assert set(OWN_COUNT) < set(METHODS)
