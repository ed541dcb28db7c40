"""The whole operator on the GPU against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tango_plugins import PruneParams
from tango_plugins.reference import prune as reference
from tests.gpu.plugins.device import Device, prune
from tests.plugins.videos import video

GRIDS = [(1, 1), (2, 3), (4, 4), (5, 7), (8, 8), (13, 13), (14, 14)]
WIDTHS = [2, 6, 18, 30, 64, 126, 200, 512, 896]


def random_case(seed):
    """A random video of any shape and structure, and parameters."""
    rng = np.random.default_rng(seed)
    grid = GRIDS[rng.integers(len(GRIDS))]
    frames = int(rng.integers(1, 17 if grid[0] > 8 else 33))
    X, A, t = video(
        frames,
        grid,
        int(rng.choice(WIDTHS)),
        seed=seed,
        cuts=set(rng.integers(1, 33, rng.integers(0, 5)).tolist()),
        moving=float(rng.choice([0, 0.1, 0.5, 0.9, 1])),
        noise=float(rng.choice([0.01, 0.1, 0.3])),
        dtype=[np.float16, np.float32][rng.integers(2)],
    )
    params = PruneParams(
        retention_ratio=float(rng.choice([0.01, 0.05, 0.1, 0.15, 0.25, 0.5, 0.9, 1.0])),
        context_ratio=float(rng.choice([0, 0.25, 0.4, 0.4, 0.4, 1])),
        expansion=float(rng.choice([1, 1.5, 1.5, 3])),
        anchor_weight=float(rng.choice([0, 0.6, 1])),
        neighbors=int(rng.choice([1, 5, 7, 33, 64])),
        grid=grid,
        merge_order=["anchor", "density"][rng.integers(2)],
        budget=["paper", "exact"][rng.integers(2)],
    )
    return (X, A, t), params


def in_common(a, b):
    return len(np.intersect1d(a.indices, b.indices)) / max(a.count, b.count, 1)


def compare(found, wanted, D):
    """Share of indices in common, and of the common tokens those whose values agree."""
    _, mine, theirs = np.intersect1d(found.indices, wanted.indices, return_indices=True)
    a, b = found.tokens[mine].astype(np.float64), wanted.tokens[theirs].astype(np.float64)
    scale = np.maximum(np.linalg.norm(b, axis=1), 1e-6)
    agree = np.linalg.norm(a - b, axis=1) / scale < 2e-3
    return in_common(found, wanted), agree.mean() if len(agree) else 1.0


@pytest.mark.parametrize(("precision", "common", "agreeing"), [("exact", 0.999, 0.995), ("fast", 0.98, 0.95)])
def test_two_hundred_random_videos_match_the_reference(precision, common, agreeing):
    kept = shared = values = 0.0
    for seed in range(200):
        clip, params = random_case(seed)
        wanted, found = reference(*clip, params), prune(*clip, params, precision)
        assert found.segments.tolist() == wanted.segments.tolist(), seed
        assert abs(found.count - wanted.count) <= 0.02 * wanted.count + 1, seed
        share, agree = compare(found, wanted, clip[0].shape[-1])
        kept, shared, values = kept + wanted.count, shared + share * wanted.count, values + agree * wanted.count
    print(
        f"{precision}: {shared / kept:.5f} of {kept:.0f} indices in common, {values / kept:.5f} of their values agree"
    )
    assert shared / kept >= common
    assert values / kept >= agreeing


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("moving", [0.0, 0.5, 1.0])
def test_a_video_of_llava_onevision_7b(precision, moving):
    clip = video(32, (14, 14), 3584, seed=3, cuts=(9, 20), moving=moving, noise=0.1, dtype=np.float16)
    wanted, found = reference(*clip, PruneParams()), prune(*clip, PruneParams(), precision)
    share, agree = compare(found, wanted, 3584)
    print(f"{precision}, {moving} moving: {found.count} kept, {share:.5f} in common, {agree:.5f} agree")
    assert found.segments.tolist() == wanted.segments.tolist()
    assert share >= {"exact": 0.999, "fast": 0.98}[precision]


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("equal frames", lambda X: X[:1].repeat(len(X), 0)),
        ("nearly equal frames", lambda X: X[:1] + 1e-3 * X),
        ("black frames", lambda X: X * 0),
        ("some black frames", lambda X: X * (np.arange(len(X)) % 2)[:, None, None]),
        ("equal tokens", lambda X: X * 0 + X[0, 0]),
        ("huge values", lambda X: X / np.abs(X).max() * 60000),
        ("tiny values", lambda X: X * 1e-4),
    ],
)
def test_degenerate_videos(precision, name, make):
    X, A, t = video(6, (5, 5), 64, seed=5)
    X = make(X).astype(np.float16)
    for budget in ("paper", "exact"):
        params = PruneParams(grid=(5, 5), budget=budget, retention_ratio=0.2)
        wanted, found = reference(X, A, t, params), prune(X, A, t, params, precision)
        assert found.segments.tolist() == wanted.segments.tolist()
        assert found.count == wanted.count
        assert in_common(found, wanted) >= (0.9 if precision == "exact" else 0.7), name


@pytest.mark.parametrize(
    ("frames", "grid", "width", "options"),
    [
        (256, (3, 3), 30, {}),
        (130, (6, 6), 64, {"retention_ratio": 0.05}),
        (3, (32, 32), 64, {}),
        (3, (32, 32), 64, {"retention_ratio": 0.9, "expansion": 3}),
        (2, (4, 4), 8192, {"retention_ratio": 0.25}),
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_largest_videos(frames, grid, width, options, dtype):
    clip = video(frames, grid, width, seed=2, cuts=(1, 77, 120), moving=0.6, dtype=dtype)
    params = PruneParams(grid=grid, **options)
    wanted, found = reference(*clip, params), prune(*clip, params, "exact")
    assert found.segments.tolist() == wanted.segments.tolist()
    share, agree = compare(found, wanted, width)
    assert share >= 0.999
    assert agree >= 0.995
    assert in_common(prune(*clip, params, "fast"), wanted) >= 0.98


def test_a_long_video_is_processed_in_strips():
    clip = video(40, (14, 14), 64, seed=1, moving=1.0, noise=0.02, dtype=np.float16)
    params = PruneParams(segment_threshold=-1.0, static_threshold=1.0)
    device = Device(*clip, params, "exact")
    assert device.pruner.region("gram").stop - device.pruner.region("gram").start < 4 * (40 * 196) ** 2
    wanted, found = reference(*clip, params), device.run().pruned()
    assert found.segments.tolist() == wanted.segments.tolist() == [[0, 40]]
    assert compare(found, wanted, 64)[0] >= 0.999


def test_values_that_are_not_finite_crash_nothing():
    X, A, t = video(4, (4, 4), 32, dtype=np.float16)
    X[1, 3], A[2, 5] = np.nan, np.nan
    device = Device(X, A, t, PruneParams(grid=(4, 4))).run()
    torch.cuda.synchronize()
    assert 0 <= int(device.outputs["count"]) <= device.pruner.capacity
