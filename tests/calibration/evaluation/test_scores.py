"""Accuracies and their intervals, on hand-made records."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tango_calibration.evaluation.evaluate import ALL, Record, Trial
from tango_calibration.evaluation.scores import Range, Scores, combine
from tango_plugins import TangoError

TANGO, TOPK = Trial("tango", 0.1), Trial("topk", 0.1)


def records(trial, right, kinds=("color",), tags=()):
    """A record for each entry of ``right`` [videos, questions]."""
    return [
        Record(
            f"v{v}",
            f"v{v}#{q}",
            "What color?",
            kinds[q % len(kinds)],
            tags,
            trial,
            "red",
            bool(ok),
            10 + v,
            100,
            1.0 * v,
            2.0,
        )
        for v, row in enumerate(right)
        for q, ok in enumerate(row)
    ]


def drawn(share, videos=80, questions=5, seed=0, together=0.0):
    """Answers with a share of correct ones; ``together`` correlates those of a video."""
    rng = np.random.default_rng(seed)
    noise = np.where(rng.random((videos, 1)) < together, rng.random((videos, 1)), rng.random((videos, questions)))
    return noise < share


def test_accuracy_is_the_share_of_correct_answers():
    found = Scores(records(ALL, [[1, 1, 0], [1, 0, 0]])).accuracy(ALL)
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((1 / 3, 2 / 3))


def test_every_question_has_the_same_weight():
    assert Scores(records(ALL, [[1, 1, 1], [0]])).accuracy(ALL).value == 0.75


def test_the_interval_has_the_theoretical_width():
    found = Scores(records(ALL, drawn(0.7, 400, 1))).accuracy(ALL)
    error = math.sqrt(found.value * (1 - found.value) / 400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_questions_of_one_video_are_not_independent():
    alone, together = (Scores(records(ALL, drawn(0.6, together=share))).accuracy(ALL) for share in (0, 1))
    assert together.high - together.low > 1.7 * (alone.high - alone.low)


def test_types_and_tags_have_their_own_accuracy():
    mine = records(ALL, [[1, 0]] * 4, kinds=("color", "shape"), tags=("small", "brief"))
    found = Scores(mine).summary(ALL)
    assert {name: e.value for name, e in found.by_type.items()} == {"color": 1.0, "shape": 0.0}
    assert {name: e.value for name, e in found.by_tag.items()} == {"brief": 0.5, "small": 0.5}


def test_a_comparison_is_paired():
    """The difference of two trials with errors on the same videos is more certain than either accuracy."""
    full = drawn(0.7, together=1)
    less = full & (np.random.default_rng(1).random(full.shape) < 0.95)
    scores = Scores(records(ALL, full) + records(TANGO, less))
    share = less.mean() / full.mean()
    relative, difference = scores.relative(TANGO), scores.difference(TANGO, ALL)
    assert relative.value == pytest.approx(share)
    assert relative.low < share < relative.high < 1
    assert difference.value == pytest.approx(less.mean() - full.mean())
    absolute = scores.accuracy(TANGO)
    assert difference.high - difference.low < (absolute.high - absolute.low) / 2


def test_equal_answers_have_no_interval():
    right = drawn(0.7)
    scores = Scores(records(ALL, right) + records(TANGO, right))
    assert scores.relative(TANGO) == replace(scores.relative(TANGO), value=1, low=1, high=1)
    assert scores.difference(TANGO, ALL) == replace(scores.relative(TANGO), value=0, low=0, high=0)


def test_missing_comparisons_are_nan():
    scores = Scores(records(ALL, [[0], [0]]) + records(TANGO, [[1], [0]]))
    assert math.isnan(scores.relative(TANGO).value)
    assert math.isnan(scores.difference(TANGO, TOPK).value)
    assert math.isnan(scores.summary(ALL).relative.value)


def test_a_summary_has_tokens_and_milliseconds():
    found = Scores(records(ALL, [[1], [1], [1]]) + records(TANGO, [[1], [0], [1]])).summary(TANGO)
    assert (found.questions, found.kept, found.total, found.prune_ms, found.prefill_ms) == (3, 11, 100, 1, 2)
    assert found.share == pytest.approx(0.11)


def test_the_same_seed_gives_the_same_interval():
    mine = records(ALL, drawn(0.6))
    assert Scores(mine, seed=1).accuracy(ALL) == Scores(mine[::-1], seed=1).accuracy(ALL)
    assert Scores(mine, seed=1).accuracy(ALL) != Scores(mine, seed=2).accuracy(ALL)


def test_runs_are_combined_by_video():
    first, second = records(ALL, drawn(0.6)), records(ALL, drawn(0.6))
    both, one = Scores(combine([first, second])).accuracy(ALL), Scores(first).accuracy(ALL)
    assert both == one  # repeating the same answers adds no certainty


def test_runs_have_a_range():
    """Two runs with accuracies 3/4 and 1/4; with all tokens 1 and 1/2."""
    runs = [
        records(ALL, full) + records(TANGO, less)
        for full, less in (([[1, 1], [1, 1]], [[1, 1], [1, 0]]), ([[1, 0], [1, 0]], [[1, 0], [0, 0]]))
    ]
    scores = Scores.of_runs(runs)
    found = scores.summary(TANGO)
    assert (found.runs, found.questions) == (2, 8)
    assert found.accuracy_of_runs == Range(0.5, 0.25, 0.75)
    assert found.relative_of_runs == Range(0.625, 0.5, 0.75)
    assert found.accuracy == Scores(combine(runs)).accuracy(TANGO)
    assert math.isnan(scores.summary(ALL).relative_of_runs.mean)


def test_the_lead_of_tango_is_paired_and_at_the_same_ratio():
    """Tango has 3 of 4, top-k 2 of 4 and in a second run 1 of 4; another ratio has no tango."""
    tango, other = records(TANGO, [[1, 1], [1, 0]]), records(Trial("topk", 0.2), [[0, 0], [0, 0]])
    runs = [tango + records(TOPK, right) + other for right in ([[1, 1], [0, 0]], [[1, 0], [0, 0]])]
    scores = Scores.of_runs(runs)
    found = scores.summary(TOPK)
    assert found.tango_ahead == scores.difference(TANGO, TOPK)
    assert found.tango_ahead.value == 0.375
    assert found.tango_ahead_of_runs == Range(0.375, 0.25, 0.5)
    for trial in (TANGO, Trial("topk", 0.2)):
        assert math.isnan(scores.summary(trial).tango_ahead.value)
        assert math.isnan(scores.summary(trial).tango_ahead_of_runs.mean)


def test_one_run_is_its_own_range():
    found = Scores(records(ALL, [[1], [0]])).summary(ALL)
    assert (found.runs, found.accuracy_of_runs) == (1, Range(0.5, 0.5, 0.5))


def test_runs_of_other_trials_are_not_combined():
    first = records(ALL, [[1], [1]])
    with pytest.raises(TangoError, match="do not have the same questions"):
        Scores.of_runs([first + records(TANGO, [[1], [1]]), first])


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        ([], "there are no records"),
        (records(ALL, [[1], [1]]) + records(TANGO, [[1]]), "do not have the same questions"),
    ],
)
def test_records_that_cannot_be_scored_are_rejected(mine, message):
    with pytest.raises(TangoError, match=message):
        Scores(mine)


@pytest.mark.parametrize("change", [{"video": "w"}, {"question": "q"}, {"type": "t"}, {"text": "?"}, {"total": 64}])
def test_runs_on_other_questions_are_not_combined(change):
    run = records(ALL, [[1], [1]])
    with pytest.raises(TangoError, match="the same questions"):
        combine([run, [replace(run[0], **change), run[1]]])
    with pytest.raises(TangoError, match="the same questions"):
        combine([run, run[:1]])
