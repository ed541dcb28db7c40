"""What pruning costs, from the scores that models/tiny/publish.py copied into benchmarks/results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tango_calibration.evaluation import results
from tango_calibration.evaluation.evaluate import ALL, NONE, Trial
from tango_calibration.evaluation.scores import Estimate, Range, Summary
from tools.docs.markdown import table

FILE = Path(__file__).parents[2] / "benchmarks/results/tiny-accuracy.json"

#: The ratio that types of question are shown for.
RATIO = 0.1

#: Times mean nothing when many processes share a GPU.
_HIDDEN = "## Tokens and time"


@cache
def summaries() -> dict[Trial, Summary]:
    """The scores, by trial."""
    found = [_summary(data) for data in json.loads(FILE.read_text(encoding="utf-8"))["summaries"]]
    return {summary.trial: summary for summary in found}


def conditions() -> str:
    """What was evaluated, a line each."""
    found = json.loads(FILE.read_text(encoding="utf-8"))["conditions"]
    return "\n".join(f"- {name}: {fact if isinstance(fact, str) else json.dumps(fact)}" for name, fact in found.items())


def costs() -> str:
    """Types of question, the largest loss first: accuracy with all tokens, with a tenth of them, and the loss."""
    before, after, floor = (summaries()[trial].by_type for trial in (ALL, Trial("tango", RATIO), NONE))
    lost = {name: round(1000 * (before[name].value - after[name].value)) / 10 for name in before}
    shown = {name: [_percent(scores[name].value) for scores in (before, after, floor)] for name in before}
    order = sorted(before, key=lambda name: -lost[name])
    rows = [(name, *shown[name][:2], _points(lost[name]), shown[name][2]) for name in order]
    return table(("type of question", "all tokens, %", "a tenth, %", "lost, points", "no tokens, %"), rows)


def overall() -> str:
    """Accuracies, the share that is kept, and Tango's lead, over all questions."""
    return _sections(results.overall(list(summaries().values())))


def over_runs() -> str:
    """The same over the three trainings."""
    return _sections(results.over_runs(list(summaries().values())))


def by_kind() -> str:
    """Accuracy for each type and tag of question at one ratio."""
    shown = [each for each in summaries().values() if each.trial in (ALL, NONE) or each.trial.retention_ratio == RATIO]
    return _sections([*results.by("type", shown), *results.by("tag", shown)])


PARTS: dict[str, Callable[[], str]] = {
    "conditions": conditions,
    "costs": costs,
    "overall": overall,
    "runs": over_runs,
    "kinds": by_kind,
}


def _sections(lines: list[str]) -> str:
    """Sections one level lower, without the hidden one."""
    sections = "\n".join(lines).split("\n## ")
    titled = [sections[0], *(f"## {section}" for section in sections[1:])]
    return "\n".join(f"#{section.strip()}\n" for section in titled if not section.startswith(_HIDDEN))


def _summary(data: dict[str, Any]) -> Summary:
    known: dict[str, Any] = _numbers(data)
    known["trial"] = Trial(**data["trial"])
    for key in ("accuracy", "relative", "tango_ahead"):
        known[key] = _estimate(data[key])
    for key in ("accuracy_of_runs", "relative_of_runs", "tango_ahead_of_runs"):
        known[key] = Range(**_numbers(data[key]))
    for key in ("by_type", "by_tag"):
        known[key] = {name: _estimate(value) for name, value in data[key].items()}
    return Summary(**known)


def _estimate(data: dict[str, float | None]) -> Estimate:
    return Estimate(**_numbers(data))


def _numbers(data: dict[str, Any]) -> dict[str, Any]:
    """JSON has null for NaN."""
    return {key: math.nan if value is None else value for key, value in data.items()}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(lost: float) -> str:
    return f"{lost:.1f}".replace("-", "−")
