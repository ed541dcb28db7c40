"""Records → accuracies, absolute and relative to all tokens, with confidence intervals.

Questions about one video are not independent, so every interval is a bootstrap over videos: the middle 95 % of the
resamples (percentiles). It covers the choice of videos; the range of several runs covers the training of the model. All
trials use the same resamples, so ratios and differences are paired. If all answers are correct, or all are wrong,
resampling has no spread and the interval is a point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tango_calibration.evaluation.evaluate import ALL, Record, Trial
from tango_plugins import TangoError

RESAMPLES = 2000

_Floats = NDArray[np.float64]
_Comparison = Callable[[_Floats, _Floats], _Floats]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval; NaN if there is nothing to compare with, or a divisor is 0."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high)


@dataclass(frozen=True)
class Range:
    """Mean, minimum and maximum over the runs; equal if there is one run, NaN as in Estimate."""

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Summary:
    """Results of one trial.

    Attributes:
        trial: The trial.
        questions: Number of questions, in all runs.
        accuracy: Share of correct answers.
        relative: Accuracy divided by that of the trial ``all``: the accuracy kept.
        tango_ahead: Accuracy of ``tango`` at the same ratio minus this accuracy.
        runs: Number of runs.
        accuracy_of_runs: Accuracy of the runs.
        relative_of_runs: Accuracy kept of the runs.
        tango_ahead_of_runs: Lead of ``tango`` in the runs.
        by_type: Accuracy for each type of question.
        by_tag: Accuracy for each tag; a question may have several.
        kept: Mean number of kept tokens. This and the following count a video once for each question about it.
        total: Mean number of a video's tokens.
        share: Mean share of kept tokens, which may differ from the retention ratio.
        prune_ms: Median time to choose the tokens, in milliseconds.
        prefill_ms: Median time of the prefill, in milliseconds.
    """

    trial: Trial
    questions: int
    accuracy: Estimate
    relative: Estimate
    tango_ahead: Estimate
    runs: int
    accuracy_of_runs: Range
    relative_of_runs: Range
    tango_ahead_of_runs: Range
    by_type: dict[str, Estimate]
    by_tag: dict[str, Estimate]
    kept: float
    total: float
    share: float
    prune_ms: float
    prefill_ms: float


class _Bootstrap:
    """Resamples of a set of videos."""

    def __init__(self, videos: Iterable[str], seed: int, resamples: int) -> None:
        self._place = {name: i for i, name in enumerate(sorted(set(videos)))}
        n = len(self._place)
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
        #: How often each video counts: once as observed, then in each resample [1 + B, videos].
        self._counts: _Floats = np.concatenate([np.ones((1, n)), drawn])

    def accuracies(self, records: Iterable[Record]) -> _Floats:
        """Accuracy as observed, then in each resample [1 + B]; NaN in a resample without any of the questions."""
        correct, asked = np.zeros((2, len(self._place)))
        for record in records:
            asked[self._place[record.video]] += 1
            correct[self._place[record.video]] += record.correct
        count = self._counts @ asked
        return np.divide(self._counts @ correct, count, out=np.full_like(count, np.nan), where=count > 0)


def difference(before: Sequence[Record], after: Sequence[Record]) -> Estimate:
    """Accuracy of one set of records minus that of another, on the same questions."""
    bootstrap = _Bootstrap((record.video for record in before), seed=0, resamples=RESAMPLES)
    return _estimate(bootstrap.accuracies(before) - bootstrap.accuracies(after))


def accuracy(records: Sequence[Record]) -> float:
    """Share of correct answers; 0 without records."""
    return sum(record.correct for record in records) / max(len(records), 1)


class Scores:
    """Scores of several trials on the same questions.

    Args:
        records: The records of all trials.
        seed: Seed of the bootstrap.
        resamples: Number of resamples.

    Raises:
        TangoError: There are no records, or two trials do not have the same questions.
    """

    def __init__(self, records: Sequence[Record], *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self._by_trial = by_trial(records)
        self._runs = [self._by_trial]
        if not records:
            raise TangoError("there are no records", "evaluate at least one video")
        asked = {trial: sorted((r.video, r.question) for r in mine) for trial, mine in self._by_trial.items()}
        first = next(iter(asked))
        for trial, questions in asked.items():
            if questions != asked[first]:
                raise TangoError(
                    f"{trial} and {first} do not have the same questions", "combine runs of the same questions"
                )
        self._bootstrap = _Bootstrap((record.video for record in records), seed, resamples)

    @classmethod
    def of_runs(cls, runs: Sequence[Sequence[Record]], *, seed: int = 0, resamples: int = RESAMPLES) -> Scores:
        """Scores of several runs together, for example of models trained from several seeds.

        Estimates are of the combined records. Summaries also have the range of the runs.

        Raises:
            TangoError: As in :func:`combine`, or a trial is missing in a run.
        """
        scores = cls(combine(runs), seed=seed, resamples=resamples)
        scores._runs = [by_trial(run) for run in runs]
        return scores

    @property
    def trials(self) -> list[Trial]:
        """The trials, in the order of the records."""
        return list(self._by_trial)

    def accuracy(self, trial: Trial, which: Callable[[Record], bool] = lambda record: True) -> Estimate:
        """Share of correct answers to the selected questions."""
        return _estimate(self._bootstrap.accuracies(filter(which, self._by_trial[trial])))

    def relative(self, trial: Trial, to: Trial = ALL) -> Estimate:
        """Accuracy of a trial divided by that of another; NaN if one is missing, never correct, or the same."""
        return self._compare(trial, to, _ratio)

    def difference(self, trial: Trial, to: Trial) -> Estimate:
        """Accuracy of a trial minus that of another; NaN if one is missing or both are the same."""
        return self._compare(trial, to, np.subtract)

    def over_runs(self, trial: Trial, to: Trial | None = None, how: _Comparison | None = None) -> Range:
        """Accuracy of a trial in the runs; with ``to``, its ratio to another trial, or another comparison (``how``).

        NaN where :meth:`relative` and :meth:`difference` are.
        """
        shares = self._shares(trial)
        if to is not None:
            shares = (how or _ratio)(shares, self._shares(to)) if self._differ(trial, to) else shares * np.nan
        return Range(float(shares.mean()), float(shares.min()), float(shares.max()))

    def summary(self, trial: Trial) -> Summary:
        """All results of a trial."""
        records, tango = self._by_trial[trial], Trial("tango", trial.retention_ratio)
        return Summary(
            trial=trial,
            questions=len(records),
            accuracy=self.accuracy(trial),
            relative=self.relative(trial),
            tango_ahead=self.difference(tango, trial),
            runs=len(self._runs),
            accuracy_of_runs=self.over_runs(trial),
            relative_of_runs=self.over_runs(trial, ALL),
            tango_ahead_of_runs=self.over_runs(tango, trial, np.subtract),
            by_type={name: self.accuracy(trial, lambda r: r.type == name) for name in types(records)},  # noqa: B023
            by_tag={name: self.accuracy(trial, lambda r: name in r.tags) for name in tags(records)},  # noqa: B023
            kept=float(np.mean([r.kept for r in records])),
            total=float(np.mean([r.total for r in records])),
            share=float(np.mean([r.kept / r.total for r in records])),
            prune_ms=float(np.median([r.prune_ms for r in records])),
            prefill_ms=float(np.median([r.prefill_ms for r in records])),
        )

    def _compare(self, trial: Trial, to: Trial, how: _Comparison) -> Estimate:
        if not self._differ(trial, to):
            return Estimate(np.nan, np.nan, np.nan)
        first, second = (self._bootstrap.accuracies(self._by_trial[each]) for each in (trial, to))
        return _estimate(how(first, second))

    def _differ(self, trial: Trial, to: Trial) -> bool:
        """Whether both have records, and are not the same."""
        return trial != to and {trial, to} <= self._by_trial.keys()

    def _shares(self, trial: Trial) -> _Floats:
        """Accuracy in each run [runs]."""
        return np.array([accuracy(run.get(trial, ())) for run in self._runs])


def combine(runs: Sequence[Sequence[Record]]) -> list[Record]:
    """Combines the records of several runs on the same videos, for example of models trained from several seeds.

    A video is resampled with the answers of all runs. So intervals still cover only the choice of videos; the range
    that :meth:`Scores.of_runs` gives covers the training.

    Raises:
        TangoError: The runs differ in their questions or numbers of video tokens.
    """
    asked = [{(r.video, r.total, r.question, r.type, r.text) for r in run} for run in runs]
    if any(questions != asked[0] for questions in asked):
        raise TangoError(
            "the runs do not have the same questions", "evaluate with the same data, seed, counts and frames"
        )
    return [record for run in runs for record in run]


def by_trial(records: Iterable[Record]) -> dict[Trial, list[Record]]:
    """Groups records by trial, in their order."""
    found: dict[Trial, list[Record]] = {}
    for record in records:
        found.setdefault(record.trial, []).append(record)
    return found


def types(records: Iterable[Record]) -> list[str]:
    """Types of the questions, sorted."""
    return sorted({record.type for record in records})


def tags(records: Iterable[Record]) -> list[str]:
    """Tags of the questions, sorted."""
    return sorted({tag for record in records for tag in record.tags})


def _ratio(shares: _Floats, to: _Floats) -> _Floats:
    """Ratio of two shares, NaN where the second is 0."""
    return np.divide(shares, to, out=np.full_like(shares, np.nan), where=to > 0)


def _estimate(values: _Floats) -> Estimate:
    """The value, and the middle 95 % of its resamples."""
    spread = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(spread):
        return Estimate(float(values[0]), np.nan, np.nan)
    low, high = np.quantile(spread, [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))
