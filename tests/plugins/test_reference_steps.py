"""Each step of the operator on cases that are small enough to compute by hand."""

from math import cos, exp, pi, sin, sqrt

import numpy as np
import pytest

from tango_plugins import PruneParams
from tango_plugins import reference as ref

# Points on a line replace rotated features, because the steps use only their distances.
LINE = np.array([[0.0], [1.0], [3.0]])


def params(**options):
    return PruneParams(**{"grid": (1, 2), "neighbors": 7} | options)


def test_sinks_are_silenced_on_a_copy():
    A = np.ones((1, 3), np.float32)
    assert ref.silence_sinks(A, (0, 2)).tolist() == [[0, 1, 0]]
    assert A.all()


def test_rotate_pairs_the_halves():
    # d = 4, base 100, position 1: angles 1 and 100^(−2/4) = 0.1; components 0 and 2 rotate, 1 and 3 rotate.
    turned = ref.rotate(np.array([[1.0, 1.0, 0.0, 0.0]]), np.array([1.0]), 100)
    assert turned[0] == pytest.approx([cos(1), cos(0.1), sin(1), sin(0.1)])


def test_rotate_leaves_the_last_of_an_odd_section():
    turned = ref.rotate(np.array([[1.0, 0.0, 5.0]]), np.array([pi / 2]), 1000)
    assert turned[0] == pytest.approx([0, 1, 5])


def test_rope_gives_each_section_its_coordinate():
    # D = 7: 3 of time (the third never rotates), 2 of rows, 2 of columns. Position 5 of a 2×3 grid is row 1, column 2.
    unit = np.zeros((1, 6, 7))
    unit[..., [0, 3, 5]] = 1
    R = ref.rope(unit, np.array([0.5]), params(grid=(2, 3)))
    assert R[0, 5] == pytest.approx([cos(0.5), sin(0.5), 0, cos(1), sin(1), cos(2), sin(2)])


def test_rope_of_the_width_of_a_7b_model():
    # 3584: 1196 of time, 1194 of rows, 1194 of columns. At time 0, row 0, column 1 only the last 1194 rotate.
    unit = np.random.default_rng(0).standard_normal((1, 2, 3584))
    R = ref.rope(unit, np.array([0.0]), params())
    assert (R[0, 1, : 1196 + 1194] == unit[0, 1, : 1196 + 1194]).all()
    assert (R[0, 1, 1196 + 1194 :] != unit[0, 1, 1196 + 1194 :]).all()


def test_rope_below_a_width_of_six_rotates_by_time_alone():
    unit = np.ones((1, 2, 5))
    R = ref.rope(unit, np.array([2.0]), params())
    assert (R[0, 0] == R[0, 1]).all()


def test_similarity_of_equal_opposite_and_black_tokens():
    X = np.array([[[3, 4], [1, 0], [0, 0]], [[6, 8], [-2, 0], [1, 1]]], np.float16)
    assert ref.similarity(ref.normalize(X)).tolist() == [[1, -1, 0]]


def test_segment_keeps_the_first_of_equal_partitions():
    # gain(0,1) = 2·1, gain(1,2) = 1·1, gain(0,2) = 1·2: {0,1}{2} and {0,1,2} both gain 2; the single last frame came
    # first.
    s = np.array([[0.9, 0.9], [0.9, 0.1]])
    assert ref.segment(s, 0.5) == [(0, 2), (2, 3)]


def test_segment_takes_the_longer_window_when_it_gains_more():
    # Three positions, one breaks: gain(0,2) = 2·2 = 4, against gain(0,1) = 3.
    s = np.array([[0.9, 0.9, 0.9], [0.9, 0.9, 0.1]])
    assert ref.segment(s, 0.5) == [(0, 3)]


def test_a_cosine_at_the_threshold_is_a_change():
    assert ref.segment(np.full((1, 4), 0.5), 0.5) == [(0, 1), (1, 2)]


def test_segment_of_one_frame():
    assert ref.segment(np.empty((0, 4)), 0.5) == [(0, 1)]


def test_windows_are_at_most_1024_frames():
    # One position that never changes, 1026 frames: two segments gain 1024; the shortest last one that does has 2.
    assert ref.segment(np.ones((1025, 1)), 0.5) == [(0, 1024), (1024, 1026)]


def test_squared_distances_are_symmetric_and_zero_between_black_tokens():
    R = np.array([[1.0, 0], [0, 1], [0, 0], [0, 0]])
    assert ref.squared_distances(R).tolist() == [[0, 2, 1, 1], [2, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    D2 = ref.squared_distances(np.random.default_rng(0).standard_normal((700, 9)))
    assert (D2 == D2.T).all()
    assert not D2.diagonal().any()


def test_density_of_the_nearest_neighbor():
    # Squares: [0 1 9], [1 0 4], [9 4 0]; the nearest other is at 1, 1 and 4.
    assert ref.densities(ref.squared_distances(LINE), 1) == pytest.approx([exp(-1), exp(-1), exp(-4)])


def test_density_of_at_most_k_tokens_takes_all_others():
    assert ref.densities(ref.squared_distances(LINE), 3) == pytest.approx([exp(-5), exp(-2.5), exp(-6.5)])


def test_density_of_one_token():
    assert ref.densities(np.zeros((1, 1)), 7).tolist() == [1]


def test_density_leaves_one_smallest_entry_out():
    # Points 0, 0, 1: an equal token counts as a neighbor at distance 0.
    D2 = ref.squared_distances(np.array([[0.0], [0], [1]]))
    assert ref.densities(D2, 1) == pytest.approx([1, 1, exp(-1)])


def test_delta_breaks_equal_densities_for_the_lower_index():
    # Densities e⁻¹, e⁻¹, e⁻⁴: 0 is the densest and takes the largest distance, 1 is 1 from 0, 2 is 2 from 1.
    D2 = ref.squared_distances(LINE)
    assert ref.deltas(D2, ref.densities(D2, 1)).tolist() == [3, 1, 2]


def test_density_peaks_come_by_density_times_delta():
    # k = 7: densities e⁻⁵, e⁻²·⁵, e⁻⁶·⁵; deltas 1, 3, 2.
    peaks, score = ref.density_peaks(ref.squared_distances(LINE), 2, 7)
    assert peaks.tolist() == [1, 0]
    assert score == pytest.approx([exp(-5), 3 * exp(-2.5), 2 * exp(-6.5)])


def test_deltas_over_several_blocks_of_rows():
    R = np.random.default_rng(1).standard_normal((600, 3))
    D2 = ref.squared_distances(R)
    density = ref.densities(D2, 5)
    expected = [sqrt(min(D2[i, density > density[i]], default=D2.max())) for i in range(600)]
    assert ref.deltas(D2, density).tolist() == expected


def test_select_takes_the_most_salient_of_each_cluster():
    # Candidates in order of salience: 1, 2, 3 at 0, 10, 11. k = 1: densities e⁻¹⁰⁰, e⁻¹, e⁻¹; deltas 10, 11, 1. Centers
    # are 2 and 3; token 1 joins 2, and being more salient replaces it.
    A = np.array([0.1, 0.9, 0.8, 0.7])
    R = np.array([[50.0], [0], [10], [11]])
    assert ref.select(A, R, 2, params(neighbors=1)).tolist() == [1, 3]


def test_select_gives_an_empty_cluster_its_own_center():
    # Four candidates at 0, 0, 0, 5 for three centers: 0, 3 and 1. All equal tokens join center 0; 1 gets its own.
    R = np.array([[0.0], [0], [0], [5]])
    assert ref.select(np.array([4.0, 3, 2, 1]), R, 3, params(neighbors=1)).tolist() == [0, 1, 3]


def test_select_of_equal_salience_takes_the_lower_index():
    assert ref.select(np.array([1.0, 2, 2, 2]), np.eye(4), 1, params()).tolist() == [1]


@pytest.mark.parametrize(("m_s", "chosen"), [(0, []), (1, [2]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_select_with_no_more_candidates_than_slots(m_s, chosen):
    assert ref.select(np.array([1.0, 0, 2]), LINE, m_s, params()).tolist() == chosen


@pytest.mark.parametrize(
    ("beta", "token"),
    [
        (0.6, 0.6 * 2 + 0.4 * 4),  # β above 1/3
        (0.0, 2 / 3 + 4 * 2 / 3),  # w = 1/3
        (1.0, 2.0),
    ],
)
def test_merge_weighs_the_anchor_against_the_mean(beta, token):
    # Anchor 1 (features 2) of three tokens of mean 4.
    kept = ref.merge(np.array([[0.0], [2], [10]]), LINE, 1, params(anchor_weight=beta))
    assert kept.indices.tolist() == [1]
    assert kept.tokens[0] == pytest.approx([token])
    assert kept.score == pytest.approx([3 * exp(-2.5)])


@pytest.mark.parametrize(("order", "rows"), [("anchor", [0, 3.6]), ("density", [3.6, 0])])
def test_merge_order(order, rows):
    # Anchors by score 1, 0. Token 0 is alone: 0. Token 1 has 2 with it: 0.6·2 + 0.4·6 = 3.6.
    kept = ref.merge(np.array([[0.0], [2], [10]]), LINE, 2, params(merge_order=order))
    ascending = kept.only(np.argsort(kept.indices))
    assert ascending.indices.tolist() == [0, 1]
    assert ascending.tokens[:, 0] == pytest.approx(rows)
    assert ascending.score == pytest.approx([exp(-5), 3 * exp(-2.5)])  # the score stays with the place


def test_merge_keeps_an_anchor_that_no_token_joins():
    # Four equal points: every score is 0, anchors are 0 and 1, and all join 0.
    kept = ref.merge(np.array([[1.0], [3], [4], [9]]), np.zeros((4, 1)), 2, params())
    assert kept.indices.tolist() == [0, 1]
    assert kept.tokens[:, 0] == pytest.approx([0.6 * 1 + 0.4 * 17 / 4, 3])


def test_merge_of_no_more_than_the_budget_changes_nothing():
    kept = ref.merge(LINE, LINE, 3, params())
    assert kept.tokens.tolist() == LINE.tolist()
    assert kept.merged.all()
    assert np.isinf(kept.score).all()


def test_merge_to_nothing():
    assert len(ref.merge(LINE, LINE, 0, params()).indices) == 0


@pytest.mark.parametrize(
    ("m", "c", "split"),
    [(20, 0.4, (12, 8)), (1, 0.4, (0, 1)), (5, 0.0, (5, 0)), (5, 1.0, (0, 5)), (0, 0.4, (0, 0))],
)
def test_split_budget(m, c, split):
    assert ref.split_budget(m, params(context_ratio=c)) == split


def test_compress_keeps_at_least_one_of_any():
    assert len(ref.compress(LINE, np.arange(3.0), LINE, 0.01, params()).indices) == 1
    assert len(ref.compress(LINE[:0], np.empty(0), LINE[:0], 0.5, params()).indices) == 0


def test_compress_segment_averages_static_positions():
    # Two frames, position 0 still, position 1 not. T = 4, g = 1, ratio 0.5/0.75 = 2/3: one still token of one, one
    # moving token per frame of one. No salient slot (floor(0.6) = 0), context slots for all: nothing is merged.
    X = np.array([[[1.0, 0], [1, 0]], [[3, 0], [0, 1]]])
    cosines = np.array([[1.0, 0.0]])
    kept = ref.compress_segment(X, np.ones((2, 2)), X, cosines, params(retention_ratio=0.5))
    assert kept.indices.tolist() == [0, 1, 3]
    assert kept.tokens.tolist() == [[2, 0], [1, 0], [0, 1]]


def test_a_cosine_at_the_static_threshold_moves():
    X = np.ones((2, 2, 2))
    cosines = np.full((1, 2), 0.8)
    kept = ref.compress_segment(X, np.ones((2, 2)), X, cosines, params(retention_ratio=1.0))
    assert len(kept.indices) == 4


def kept_four():
    # 5 selected, 1 unmerged context, 3 and 7 merged.
    return ref.Kept(
        np.array([5, 1, 3, 7]),
        np.zeros((4, 1)),
        np.array([False, True, True, True]),
        np.array([np.inf, np.inf, 0.2, 0.1]),
    )


@pytest.mark.parametrize(("count", "left"), [(4, [1, 3, 5, 7]), (3, [1, 3, 5]), (2, [1, 5]), (1, [5])])
def test_exact_drops_merged_then_unmerged_then_selected(count, left):
    exact = ref.make_exact(kept_four(), np.zeros((8, 1)), np.arange(8.0), count)
    assert sorted(exact.indices) == left


def test_exact_drops_the_higher_index_of_equal_scores():
    kept = ref.Kept(np.array([9, 2]), np.zeros((2, 1)), np.ones(2, bool), np.array([0.5, 0.5]))
    assert ref.make_exact(kept, np.zeros((10, 1)), np.zeros(10), 1).indices.tolist() == [2]


def test_exact_adds_the_most_salient_as_they_were():
    X, A = np.arange(8.0)[:, None], np.array([0, 9, 4, 9, 4, 9, 1, 9.0])
    exact = ref.make_exact(kept_four(), X, A, 6)
    assert exact.indices.tolist() == [5, 1, 3, 7, 2, 4]  # 2 and 4 are equal: the lower first
    assert exact.tokens[4:, 0].tolist() == [2, 4]
    assert not exact.merged[4:].any()
