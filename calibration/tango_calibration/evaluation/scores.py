"""Records → accuracies, what they are relative to all tokens, and how sure that is.

Questions about one video are not independent, so every interval comes from a bootstrap over videos: 95 % of the
resamples lie in it (percentiles). It tells how far the choice of videos decides; what other trainings of the model
would give, the range of several runs tells. All trials are judged on the same resamples, so ratios and differences of
two are paired. Where every answer is right, or every one wrong, resampling finds no spread and the interval is a point.
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
    """A value with its 95 % confidence interval; NaN where there is nothing to compare with or to divide by."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Range:
    """Mean of the runs, the lowest and the highest of them; all the same where there is one, NaN as in Estimate."""

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Summary:
    """What one trial gives.

    Attributes:
        trial: The trial.
        questions: How many were asked, in all runs.
        accuracy: Share of right answers.
        relative: That share relative to the trial ``all``: accuracy kept.
        tango_ahead: The share of ``tango`` at the same ratio less that share.
        runs: How many there were.
        accuracy_of_runs: Accuracy of each by itself.
        relative_of_runs: Accuracy kept of each by itself.
        tango_ahead_of_runs: How far ``tango`` is ahead in each by itself.
        by_type: Accuracy per type of question.
        by_tag: Accuracy per tag; a question may have several.
        kept: Mean tokens kept of a video, here as below each video as often as it is asked about.
        total: Mean tokens of a video.
        share: Mean share kept of a video's tokens, which may be another than the ratio that was asked for.
        prune_ms: Median milliseconds of the choice of tokens.
        prefill_ms: Median milliseconds of the prefill.
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


class Scores:
    """Records of several trials on the same questions.

    Args:
        records: All of them.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Raises:
        TangoError: There are no records, or two trials were not asked the same questions.
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
                raise TangoError(f"{trial} was not asked what {first} was asked", "combine runs of the same questions")
        self._videos = {name: i for i, name in enumerate(sorted({record.video for record in records}))}
        n = len(self._videos)
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
        #: How often each video counts: first as it is, then in each resample [1 + B, videos].
        self._weights: _Floats = np.concatenate([np.ones((1, n)), drawn])

    @classmethod
    def of_runs(cls, runs: Sequence[Sequence[Record]], *, seed: int = 0, resamples: int = RESAMPLES) -> Scores:
        """Scores of several runs together, such as of models trained from several seeds.

        Estimates are those of the combined records; beside them, summaries tell the range of the runs.

        Raises:
            TangoError: As :func:`combine`, or a run lacks a trial that another has.
        """
        scores = cls(combine(runs), seed=seed, resamples=resamples)
        scores._runs = [by_trial(run) for run in runs]
        return scores

    @property
    def trials(self) -> list[Trial]:
        """The trials, in the order of the records."""
        return list(self._by_trial)

    def accuracy(self, trial: Trial, which: Callable[[Record], bool] = lambda record: True) -> Estimate:
        """Share of right answers to the questions that are meant."""
        return _estimate(self._accuracies(trial, which))

    def relative(self, trial: Trial, to: Trial = ALL) -> Estimate:
        """Accuracy of a trial divided by that of another; NaN where one is absent, both are one, or never right."""
        return self._compare(trial, to, _ratio)

    def difference(self, trial: Trial, to: Trial) -> Estimate:
        """Accuracy of a trial less that of another; NaN where one is absent or both are one."""
        return self._compare(trial, to, np.subtract)

    def over_runs(self, trial: Trial, to: Trial | None = None, how: _Comparison | None = None) -> Range:
        """Accuracy of a trial in each run; with ``to``, divided by that of another, or compared with it otherwise.

        NaN where :meth:`relative` and :meth:`difference` are.
        """
        shares = self._shares(trial)
        if to is not None:
            shares = (how or _ratio)(shares, self._shares(to)) if self._differ(trial, to) else shares * np.nan
        return Range(float(shares.mean()), float(shares.min()), float(shares.max()))

    def summary(self, trial: Trial) -> Summary:
        """All there is to say about a trial."""
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
        return _estimate(how(self._accuracies(trial), self._accuracies(to)))

    def _differ(self, trial: Trial, to: Trial) -> bool:
        """Whether both were asked, and are not the same."""
        return trial != to and {trial, to} <= self._by_trial.keys()

    def _shares(self, trial: Trial) -> _Floats:
        """Share of right answers in each run [runs]."""
        return np.array([_share(run.get(trial, ())) for run in self._runs])

    def _accuracies(self, trial: Trial, which: Callable[[Record], bool] = lambda record: True) -> _Floats:
        """[1 + B]: as it is, then in each resample; NaN in a resample without such a question."""
        right, asked = np.zeros((2, len(self._videos)))
        for record in filter(which, self._by_trial[trial]):
            asked[self._videos[record.video]] += 1
            right[self._videos[record.video]] += record.correct
        count = self._weights @ asked
        return np.divide(self._weights @ right, count, out=np.full_like(count, np.nan), where=count > 0)


def combine(runs: Sequence[Sequence[Record]]) -> list[Record]:
    """The records of several runs on the same videos, such as models trained from several seeds, as one.

    A video is resampled with the answers of all runs. So intervals still tell of the choice of videos alone: look at
    the range that :meth:`Scores.of_runs` gives for what training varies.

    Raises:
        TangoError: The runs were not asked the same questions about as many video tokens.
    """
    asked = [{(r.video, r.total, r.question, r.type, r.text) for r in run} for run in runs]
    if any(questions != asked[0] for questions in asked):
        raise TangoError(
            "the runs were not asked the same questions", "evaluate with the same data, seed, counts and frames"
        )
    return [record for run in runs for record in run]


def by_trial(records: Iterable[Record]) -> dict[Trial, list[Record]]:
    """The records of each trial, in their order."""
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


def _share(records: Sequence[Record]) -> float:
    """Of right answers; 0 where nothing was asked."""
    return sum(record.correct for record in records) / max(len(records), 1)


def _ratio(shares: _Floats, to: _Floats) -> _Floats:
    """One divided by the other, NaN where that is 0."""
    return np.divide(shares, to, out=np.full_like(shares, np.nan), where=to > 0)


def _estimate(values: _Floats) -> Estimate:
    """The value, and the middle 95 % of its resamples."""
    spread = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(spread):
        return Estimate(float(values[0]), np.nan, np.nan)
    low, high = np.quantile(spread, [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))
