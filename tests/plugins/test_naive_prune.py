from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from tango_plugins import PruneParams
from tango_plugins.reference import normalize, prune, segment, similarity
from tests.plugins import naive_prune
from tests.plugins.videos import cases, video


@given(cases(budget="paper"))
@settings(max_examples=150)
def test_the_reference_agrees_with_the_naive_restatement(case):
    (X, A, t), params = case
    X, A, t = X.astype(np.float64), A.astype(np.float64), t.astype(np.float64)
    pruned = prune(X, A, t, params)
    expected = naive_prune.prune(X.tolist(), A.tolist(), t.tolist(), pruned.segments.tolist(), params)
    assert pruned.indices.tolist() == sorted(expected)
    assert pruned.tokens == pytest.approx(np.array([expected[i] for i in sorted(expected)]), abs=1e-9)


@pytest.mark.parametrize("ratio", [0.1, 0.1217, 0.2])
def test_the_grid_and_sinks_of_llava_video(ratio):
    """13×13 tokens a frame; the loudest of them are its sinks."""
    params = PruneParams(ratio, grid=(13, 13), sink_positions=(26, 157, 11))
    X, A, t = (x.astype(np.float64) for x in video(3, (13, 13), 12, seed=3, cuts=(2,), moving=0.3))
    A[:, params.sinks] = 9.0
    pruned = prune(X, A, t, params)
    expected = naive_prune.prune(X.tolist(), A.tolist(), t.tolist(), pruned.segments.tolist(), params)
    assert pruned.indices.tolist() == sorted(expected)
    assert pruned.tokens == pytest.approx(np.array([expected[i] for i in sorted(expected)]), abs=1e-9)
    loud = prune(X, A, t, replace(params, sink_positions=()))
    salient, with_sinks = ({*(found.indices[~found.merged] % 169).tolist()} for found in (pruned, loud))
    assert not salient & {26, 157, 11}
    assert with_sinks >= {26, 157, 11}


@given(cases())
@settings(max_examples=100)
def test_no_partition_of_the_frames_has_a_larger_gain(case):
    (X, _, _), params = case
    s = similarity(normalize(X))
    found = segment(s, params.tau_segment)
    assert [a for a, _ in found] + [len(X)] == [0] + [b for _, b in found]
    gains = sum(naive_prune.gain(s.tolist(), a, b - 1, params.tau_segment) for a, b in found)
    assert gains == naive_prune.largest_gain(s.tolist(), len(X), params.tau_segment)
