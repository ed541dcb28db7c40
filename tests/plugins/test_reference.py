"""Properties of the whole operator on any video."""

import numpy as np
import pytest
from hypothesis import given, settings

from tango_plugins import PruneParams, TangoError
from tango_plugins.op import capacity, exact_count
from tango_plugins.reference import prune
from tests.plugins.videos import cases, video


@given(cases())
@settings(max_examples=150)
def test_what_is_kept_is_well_formed(case):
    (X, A, t), params = case
    F, L, D = X.shape
    pruned = prune(X, A, t, params)
    assert pruned.count == len(pruned.indices) == len(pruned.tokens) == len(pruned.merged)
    assert 1 <= pruned.count <= capacity(F, L, params)
    assert (np.diff(pruned.indices) > 0).all()
    assert set(pruned.indices) <= set(range(F * L))
    assert pruned.tokens.dtype == X.dtype
    assert pruned.tokens.shape[1:] == (D,)
    assert np.isfinite(pruned.tokens).all()
    assert pruned.indices.dtype == pruned.segments.dtype == np.int32
    assert pruned.segments[:, 0].tolist() == [0, *pruned.segments[:-1, 1]]
    assert pruned.segments[-1, 1] == F


@given(cases(budget="exact"))
@settings(max_examples=100)
def test_the_exact_budget_is_exact(case):
    (X, A, t), params = case
    assert prune(X, A, t, params).count == exact_count(*X.shape[:2], params)


@given(cases(budget="paper"))
@settings(max_examples=50)
def test_the_merge_order_moves_rows_among_the_same_places(case):
    (X, A, t), params = case
    anchor = prune(X, A, t, PruneParams(**vars(params) | {"merge_order": "anchor"}))
    density = prune(X, A, t, PruneParams(**vars(params) | {"merge_order": "density"}))
    assert (anchor.indices == density.indices).all()
    assert np.sort(anchor.tokens.ravel()).tolist() == np.sort(density.tokens.ravel()).tolist()
    assert (anchor.tokens[~anchor.merged] == density.tokens[~density.merged]).all()


def test_everything_is_kept_of_a_moving_video_at_ratio_one():
    X, A, t = video(4, (3, 3), 32, moving=1.0)
    pruned = prune(X, A, t, PruneParams(retention_ratio=1.0, grid=(3, 3)))
    assert (pruned.tokens.reshape(X.shape) == X).all()


def test_a_still_video_is_one_frame_even_at_ratio_one():
    X, A, _ = video(1, (3, 3), 32)
    still = np.repeat(X, 5, axis=0)
    pruned = prune(still, np.repeat(A, 5, axis=0), np.arange(5.0), PruneParams(retention_ratio=1.0, grid=(3, 3)))
    assert pruned.segments.tolist() == [[0, 5]]
    assert pruned.indices.tolist() == list(range(9))
    assert pruned.tokens == pytest.approx(X[0], rel=1e-6)


@pytest.mark.parametrize("budget", ["paper", "exact"])
@pytest.mark.parametrize("fill", [0.0, 1.0, 6e4])
def test_equal_tokens_and_black_frames(fill, budget):
    X = np.full((3, 6, 12), fill, np.float16)
    pruned = prune(X, np.zeros((3, 6), np.float32), np.arange(3.0), PruneParams(0.5, grid=(2, 3), budget=budget))
    assert (pruned.tokens == np.float16(fill)).all()


def test_black_tokens_go_to_the_lower_index():
    # Of six equal tokens three are kept: m_s = floor(3·0.6) = 1 selected, then 2 merged of the others.
    pruned = prune(np.zeros((1, 6, 12), np.float32), np.ones((1, 6)), np.zeros(1), PruneParams(0.5, grid=(2, 3)))
    assert pruned.indices.tolist() == [0, 1, 2]
    assert pruned.merged.tolist() == [False, True, True]


def test_near_duplicates_leave_room_for_what_differs():
    # Ten tokens that only time would turn, nine of them almost equal; the tenth, their opposite, is the least salient.
    # Two salient places and ten candidates: the densest of the nine and the tenth are the centers, and in the cluster
    # of the nine the most salient wins.
    rng = np.random.default_rng(0)
    X = np.ones((1, 10, 4)) + 1e-5 * rng.standard_normal((1, 10, 4))
    X[0, 9] = -1
    A = np.linspace(1, 0.1, 10)[None]
    pruned = prune(X, A, np.zeros(1), PruneParams(0.2, context_ratio=0, expansion=5, grid=(10, 1)))
    assert pruned.indices.tolist() == [0, 9]


def test_one_frame_of_one_token():
    pruned = prune(np.ones((1, 1, 1), np.float32), np.ones((1, 1), np.float32), np.zeros(1), PruneParams(grid=(1, 1)))
    assert pruned.indices.tolist() == [0]
    assert pruned.tokens.tolist() == [[1]]


def test_twice_the_same_and_the_inputs_untouched():
    X, A, t = video(4, (14, 14), 24)
    before = X.copy(), A.copy(), t.copy()
    one, two = (prune(X, A, t, PruneParams()) for _ in range(2))
    assert one.tokens.tobytes() == two.tokens.tobytes()
    assert one.indices.tobytes() == two.indices.tobytes()
    assert all((a == b).all() for a, b in zip((X, A, t), before, strict=True))


def test_sinks_are_not_selected_for_their_salience():
    X, A, t = video(1, (14, 14), 24)
    A[:, [28, 27]] = 100
    pruned = prune(X, A, t, PruneParams())
    assert not set(pruned.indices[~pruned.merged]) & {28, 27}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "index"), [("features", (1, 2, 3)), ("salience", (1, 2)), ("timestamps", (1,))], ids=lambda v: str(v)
)
def test_a_value_that_is_not_finite_is_rejected_by_place(name, index, bad):
    inputs = dict(zip(("features", "salience", "timestamps"), video(2, (2, 2), 8), strict=True))
    inputs[name][index] = bad
    with pytest.raises(TangoError, match=rf"{name}\[{', '.join(map(str, index))}\] is {bad}"):
        prune(**inputs, params=PruneParams(grid=(2, 2)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", np.ones((2, 4, 8), np.int8), "features has dtype int8"),
        ("salience", np.ones((2, 4), np.float16), "salience has dtype float16"),
        ("timestamps", np.arange(2), "timestamps has dtype int64"),
        ("features", np.ones((2, 5, 8)), r"features has shape \[2, 5, 8\]"),
        ("features", np.ones((0, 4, 8)), r"features has shape \[0, 4, 8\]"),
        ("features", np.ones((2, 4)), r"features has shape \[2, 4\]"),
        ("salience", np.ones((4, 2)), r"salience has shape \[4, 2\]"),
        ("timestamps", np.ones(3), r"timestamps has shape \[3\]"),
    ],
)
def test_wrong_arrays_are_rejected_by_name(name, value, message):
    inputs = dict(zip(("features", "salience", "timestamps"), video(2, (2, 2), 8), strict=True))
    with pytest.raises(TangoError, match=message):
        prune(**inputs | {name: value}, params=PruneParams(grid=(2, 2)))
